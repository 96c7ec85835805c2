"""A tensor whose axes have names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NamedTensor:
    """`values` and the name of each of its axes, such as ("image", "head", "position", "kernel")."""

    values: Tensor
    axes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim:
            raise ValueError(f"invalid axes={self.axes}; expected one name for each of {tuple(self.values.shape)}")

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis by name."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    def select(self, **indices: int) -> NamedTensor:
        """Return the entry at an index of some axes, by name, without those axes: ``select(image=0, head=2)``.

        Raises: ValueError: If there is no axis of this name. IndexError: If an index is outside its axis.
        """
        if unknown := indices.keys() - set(self.axes):
            raise ValueError(f"invalid axis {min(unknown)!r}; expected one of {', '.join(self.axes)}")
        values = self.values
        for place in reversed(range(len(self.axes))):
            if self.axes[place] in indices:
                values = values.select(place, indices[self.axes[place]])
        return NamedTensor(values, tuple(axis for axis in self.axes if axis not in indices))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        return f"NamedTensor({sizes}, dtype={self.values.dtype})"
