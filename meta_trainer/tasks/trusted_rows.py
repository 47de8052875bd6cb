"""Whether plain training reads the meta set, too, or nothing else: what tasks with such a baseline share."""


class TrustedRowsArguments:
    """What follows from two settings that a task's arguments declare.

    Attributes:
        train_on_meta: Train on the meta set as well.
        train_on_meta_alone: Train on the meta set and on nothing else.
    """

    train_on_meta: bool
    train_on_meta_alone: bool

    @property
    def baseline(self) -> str:
        """What a run without a meta module is called in tables."""
        if self.train_on_meta_alone:
            return "plain training on the meta set"
        return "plain training on both sets" if self.train_on_meta else "plain training"

    def _check_one_of_two(self) -> None:
        if self.train_on_meta and self.train_on_meta_alone:
            raise ValueError("train_on_meta adds the meta set, train_on_meta_alone leaves the rest out: set one.")
