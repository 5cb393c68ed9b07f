"""Flags of the reference model: the source of its losses."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import check_fields


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """The reference of --selection rho1 and --eslm-score excess."""

    reference: str | None = None
    """Folder of checkpoints of the reference model. It scores every micro-batch during training, in
    exactly the same context, and costs one forward pass per micro-step, and another over what a
    step reads where sequences are selected ahead of it."""

    reference_losses: str | None = None
    """Name of the losses that tools/score_reference.py --name stored beside each prefix of
    --data-path. Training then does not need the reference model."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reference is not None and self.reference_losses is not None:
            raise ConfigError(
                f"--reference {self.reference} and --reference-losses {self.reference_losses} are "
                "two sources of the same losses; give only one of them."
            )
        name = self.reference_losses
        if name is not None and not is_plain_name(name):
            raise ConfigError(
                f"--reference-losses {name!r} is not a name of scored losses (letters, digits, "
                "'-', '_', '.'). Give the --name that tools/score_reference.py was called with, "
                "not a path."
            )

    @property
    def given(self) -> bool:
        """Whether there is a source of reference losses."""
        return self.reference is not None or self.reference_losses is not None


def is_plain_name(name: str) -> bool:
    """Whether a name is safe as part of a file name."""
    return name.replace("-", "").replace("_", "").replace(".", "").isalnum()
