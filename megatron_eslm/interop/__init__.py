"""Hugging Face both ways: conversion of weights, proof by equal logits, generation."""
