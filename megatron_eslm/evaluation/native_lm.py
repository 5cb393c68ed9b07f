"""Our models as lm-eval's `LM`, equal to its `HFLM` on the exported folder.

Rules that decide scores, each with a test (tests/evaluation/test_native_lm.py):

- context and continuation are tokenized together and then cut (`TemplateLM._encode_pair`);
- an empty context is one end-of-document id; no other context gets one;
- what is longer than the model's positions loses ids from the left, never of the continuation;
- padding rows of the vocabulary take no probability;
- a row's score does not depend on the rows beside it.

One difference is meant: text that spells a special token is ordinary text here, as in training,
while HFLM reads it as that token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation.scorer import Scorer, Wanted

Answer = TypeVar("Answer")

NEW_TOKENS = 256
"""Tokens to generate where a task does not say, as in HFLM; half of the positions where the model
has fewer than twice that."""


class NativeLM(TemplateLM):
    """A frozen model that answers lm-eval's requests.

    Each rank runs lm-eval on all documents, with the same requests, and the ranks share in
    answering them. lm-eval can also divide documents among ranks, but draws few-shot examples from
    one stream, so that a document would get others with another number of ranks.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        group: dist.ProcessGroup | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        """
        Args:
            scorer: the model.
            tokenizer: its tokenizer.
            group: ranks that share in answering; None for one.
            quiet: show no progress.
        """
        super().__init__()
        self._scorer, self._ids, self._group = scorer, tokenizer, group
        self._device = scorer.device
        self._quiet = quiet or dist.get_rank() != 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id, which also is the prefix of an empty context."""
        return self._ids.eod

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._scorer.positions

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return min(NEW_TOKENS, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        """Kind and contents of the tokenizer."""
        return f"{self._ids.name}-{self._ids.identity}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of ordinary text: none is added, and none stands for a special token."""
        return self._ids.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As of lm-eval, shared by the ranks, and without its progress bar if this is quiet."""
        quiet = disable_tqdm or self._quiet
        answer = super().loglikelihood
        return self._shared(requests, lambda mine: answer(mine, disable_tqdm=quiet))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        wanted = [self._wanted(context, continuation) for _, context, continuation in requests]
        with self._progress("continuations", len(wanted), disable_tqdm) as bar:
            scores = self._scorer.score(wanted, bar.update)
        answers = [(score.log_probability, score.greedy) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _wanted(self, context: list[int], continuation: list[int]) -> Wanted:
        if not continuation or len(continuation) > self.max_length:
            raise ConfigError(
                f"A continuation has {len(continuation)} tokens, and this model can score 1 to "
                f"{self.max_length} (its positions). Leave the task out, or use a model of longer "
                "sequences."
            )
        ids = (context + continuation)[-(self.max_length + 1) :]
        return Wanted(tuple(ids[:-1]), tuple(continuation))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once from as much as fits."""
        return self._shared(requests, lambda mine: self._rolling(mine, disable_tqdm))

    def _rolling(self, requests: Any, disable_tqdm: bool) -> list[float]:
        wanted: list[Wanted] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(wanted)
            wanted += [self._wanted(*utils.make_disjoint_window(window)) for window in windows]
            counts.append(len(wanted) - before)
        with self._progress("windows", len(wanted), disable_tqdm) as bar:
            scores = iter(self._scorer.score(wanted, bar.update))
        sums = [sum(next(scores).log_probability for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuations, each up to its stop sequence.

        Raises:
            ConfigError: a task wants samples, or more tokens than the model has positions.
        """
        return self._shared(requests, lambda mine: self._texts(mine, disable_tqdm))

    def _texts(self, requests: Any, disable_tqdm: bool) -> list[str]:
        rows = []
        for request in requests:
            context, settings = request.args
            stops, most = self._generation(settings)
            ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
            rows.append(_Row(tuple(ids), stops, most))
        texts = [""] * len(rows)
        with self._progress("texts", len(rows), disable_tqdm) as bar:

            def take(number: int, new: int) -> bool:
                row = rows[number]
                if new != self.eot_token_id:
                    row.new.append(new)
                text = self._ids.decode(row.new)
                if new != self.eot_token_id and len(row.new) < row.most and not row.stops_in(text):
                    return True
                texts[number] = postprocess_generated_text(text, row.stops, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                bar.update(1)
                return False

            self._scorer.extend([row.ids for row in rows], [row.most for row in rows], take)
        return texts

    def _generation(self, settings: dict[str, Any]) -> tuple[list[str], int]:
        """Stop sequences and the most new tokens."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        if known.get("do_sample"):
            raise ConfigError(
                f"A task wants sampled text ({settings}), and only the likeliest continuation is "
                "generated here. Leave the task out, or set do_sample: false in its YAML file."
            )
        most = int(known["max_gen_toks"])
        if not 0 < most < self.max_length:
            raise ConfigError(
                f"A task wants {most} new tokens, and the model has {self.max_length} positions. "
                "Set max_gen_toks in the generation_kwargs of its YAML file below that."
            )
        return [stop for stop in known["until"] if stop], most

    def _progress(self, what: str, total: int, disable: bool) -> tqdm:
        return tqdm(total=total, desc=what, disable=disable or self._quiet)

    def _shared(self, requests: Any, answer: Callable[[Any], list[Answer]]) -> list[Answer]:
        """Answers to all requests, of which this rank computes a share. Collective.

        Requests of one document stay together, since they often have the same inputs.
        """
        if self._group is None or self._group.size() == 1:
            return answer(requests)
        rank, size = self._group.rank(), self._group.size()
        share_of = [
            (number if request.doc_id is None else request.doc_id) % size
            for number, request in enumerate(requests)
        ]
        mine = [each for each, of in zip(requests, share_of, strict=True) if of == rank]
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, answer(mine) if mine else [], group=self._group)
        answers = [iter(share) for share in shares]
        return [next(answers[of]) for of in share_of]


class _Row:
    """A text that is being continued."""

    def __init__(self, ids: tuple[int, ...], stops: list[str], most: int) -> None:
        self.ids = ids
        self.new: list[int] = []
        """Ids that continue it."""
        self.stops = stops
        self.most = most
        """New ids at most."""

    def stops_in(self, text: str) -> bool:
        """Whether the text has a stop sequence."""
        return any(stop in text for stop in self.stops)
