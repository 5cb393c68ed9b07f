"""Files that other processes may share, cut short or forge: read strictly, written whole."""
