"""Fitting a pack: least squares over a model's KV for many texts, then integers, then scales from texts held back.

One Cholesky factor a layer gives every regression at once: its variables are the features of the layers below and the
layer's own channels in coding order, and each channel is predicted from all variables before its pair. Floating point
is at home here: a pack is data, and whoever fits it again may get another one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbuy.codec.arrays import Array
from kvbuy.codec.column import CLASSES
from kvbuy.codec.grid import GRIDS
from kvbuy.codec.pack import LONGEST, TAIL, PackFacts, PackLayer
from kvbuy.codec.repeats import LENGTHS, find_repeats
from kvbuy.codec.walk import REMEMBERED, STEADY
from kvbuy.parts import FloatType

Reals = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

RIDGE = 3e-4  # of the features' mean square: measured, more and less are both worse
SPREAD = 45  # a feature's standard deviation in steps, at most: 127 is then 2.8 of them or more
SCALE = 14  # log2 of a residual's scale in fixed point
FIT_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a layer's keys or values turn: pairs of a head's channels [planes, 2], their row of the angles [planes]."""

    planes: Integers
    frequency: Integers


@dataclass(frozen=True, slots=True)
class Sample:
    """A text's token ids and its KV: key and value arrays [heads, tokens, dim] of each full layer in turn."""

    token_ids: tuple[int, ...]
    tensors: Sequence[Array]


class Fit:
    """Gathers samples, then makes a pack's tensors of them.

    `angles` are radians a token, [frequencies]; `rotations` those of each layer's keys and values. The first sample
    sets the features' steps.
    """

    def __init__(self, facts: PackFacts, *, angles: Reals, rotations: Sequence[tuple[Rotation, Rotation]]) -> None:
        self.facts, self.angles, self.grid = facts, angles, GRIDS[facts.dtype]
        self.pairs = [_pairs(layer, one, len(angles)) for layer, one in zip(facts.layers, rotations, strict=True)]
        self.tokens = 0
        self._mean: list[Reals] = []
        self._step: list[Reals] = []
        self._products: dict[tuple[int, int], Reals] = {}

    def observe(self, sample: Sample) -> None:
        """Take a sample into account."""
        values = self.values(sample)
        if not self._mean:
            self._mean = [layer.mean(axis=1, dtype=np.float64) for layer in values]
            spread = [layer.std(axis=1, dtype=np.float64) + 1e-30 for layer in values]
            self._step = [2.0 ** np.ceil(np.log2(one / SPREAD)) for one in spread]
        features = [self._features(index, layer) for index, layer in enumerate(values)]
        for index, own in enumerate(features):
            for depth in range(min(index, self.facts.depth) + 1):
                product = (own @ features[index - depth].T).astype(np.float64)
                self._products[index, depth] = self._products.get((index, depth), 0) + product
        self.tokens += len(sample.token_ids)

    def values(self, sample: Sample) -> list[Singles]:
        """A sample's numbers before rotation, [channels, tokens] of each layer in coding order."""
        turned = []
        cosine, sine = np.cos(self._turn(sample)), np.sin(self._turn(sample))
        for index, pairs in enumerate(self.pairs):
            numbers = np.concatenate(
                [
                    read_numbers(one, self.facts.dtype).transpose(0, 2, 1).reshape(-1, one.shape[1])
                    for one in _layer(sample, index)
                ]
            )
            a, b = numbers[pairs[:, 0]], numbers[pairs[:, 1]]
            c, s = cosine[pairs[:, 2]], sine[pairs[:, 2]]
            both = np.stack([a * c + b * s, b * c - a * s], axis=1)
            turned.append(both.reshape(-1, both.shape[-1]).astype(np.float32))
        return turned

    def finish(
        self, held_back: Sequence[Sample], *, progress: Callable[[int, int], None] = lambda _, __: None
    ) -> dict[str, npt.NDArray[Any]]:
        """The pack's tensors; `held_back` are samples that were not observed (their values are the scales').

        `progress` is told the layers done, and how many there are.
        """
        tensors: dict[str, npt.NDArray[Any]] = {
            "distributions": _distributions(),
            "energy": _energy(),
            **_rotation(self.angles),
        }
        tuning = Tuning(self, held_back)
        for index in range(len(self.pairs)):
            tuned = tuning.tune(index, self._draft(index))
            tensors |= {f"layer.{index}.{name}": tensor for name, tensor in tuned.items()}
            progress(index + 1, len(self.pairs))
        tensors["known"] = tuning.known
        return tensors

    def _turn(self, sample: Sample) -> Reals:
        angles = np.concatenate([self.angles, [0.0]])
        return angles[:, None] * np.arange(len(sample.token_ids))[None]

    def _features(self, index: int, values: Singles) -> Singles:
        steps = (values - self._mean[index][:, None]) / self._step[index][:, None]
        return np.clip(np.floor(steps), -127, 127).astype(np.float32)

    def _draft(self, index: int) -> "Draft":
        """A layer's regression in integers."""
        weights, error = self._regress(index)
        step = self._step[index]
        error = error * step
        scale = np.sqrt((error[::2] ** 2 + error[1::2] ** 2) / 2)  # a pair shares a fixed point
        unit = (np.round(np.log2(scale)) - SCALE).astype(np.int64).repeat(2)
        feature_shift = np.clip(np.log2(step).astype(np.int64) - unit, 0, 31)
        largest = np.minimum(np.abs(weights).max(axis=1), 2.0**20) + 2.0**-20
        octave = np.floor(np.log2(127 / largest)).astype(np.int64)
        limit = (2**24 - 1) // 127
        rounded = np.round(weights * 2.0 ** octave[:, None])
        while (excess := np.abs(rounded).sum(axis=1) > limit).any():  # more than a thousand large weights: halve them
            octave -= excess
            rounded = np.round(weights * 2.0 ** octave[:, None])
        mean = np.clip(np.round(self._mean[index] / 2.0**unit), -(2.0**29), 2.0**29).astype(np.int64)
        return Draft(rounded.astype(np.int8), unit, mean, feature_shift, np.clip(feature_shift - octave, -20, 20))

    def _regress(self, index: int) -> tuple[Reals, Reals]:
        """Weights [channels, below + channels] between features, and each channel's error in its own steps."""
        depth = min(index, self.facts.depth)
        parts = [index - 1 - at for at in range(depth)] + [index]
        square = np.block([[self._product(row, column) for column in parts] for row in parts])
        square[np.diag_indices_from(square)] += RIDGE * np.trace(square) / len(square) + 1e-9
        factor = np.linalg.cholesky(square)
        inverse = np.linalg.inv(factor)
        channels = len(self._mean[index])
        below = len(square) - channels
        weights, error = np.zeros((channels, len(square))), np.zeros(channels)
        for channel in range(0, channels, 2):
            known, rows = below + channel, slice(below + channel, below + channel + 2)
            # (as factor @ inverse is 1, this is factor[rows, :known] @ inverse[:known, :known])
            weights[channel : channel + 2, :known] = -factor[rows, rows] @ inverse[rows, :known]
            error[channel : channel + 2] = np.sqrt((factor[rows, known:] ** 2).sum(axis=1) / self.tokens)
        return weights, error

    def _product(self, row: int, column: int) -> Reals:
        if row >= column:
            return self._products[row, row - column]
        return self._products[column, column - row].T


@dataclass(frozen=True, slots=True)
class Draft:
    """A layer's predictor before its scales are known; shapes as in the pack, `unit` the exponent of fixed point."""

    weights: npt.NDArray[np.int8]
    unit: Integers
    mean: Integers
    feature_shift: Integers
    weight_shift: Integers


class Tuning:
    """Scales, offsets and repeats from samples held back, layer after layer, in the integers of the walk."""

    def __init__(self, fit: Fit, samples: Sequence[Sample]) -> None:
        self.fit = fit
        self.values = [np.concatenate(parts, axis=1) for parts in zip(*map(fit.values, samples), strict=True)]
        starts = np.cumsum([0] + [len(sample.token_ids) for sample in samples])
        found = [find_repeats(sample.token_ids, FIT_BLOCK) for sample in samples]
        self.order = np.concatenate([one.order for one in found])
        self.position = np.concatenate([one.position + at for one, at in zip(found, starts, strict=False)])
        known = [np.where(one.known < 0, -1, one.known + at) for one, at in zip(found, starts, strict=False)]
        self.known = np.empty(0, np.uint8)
        self._seen = np.concatenate(known)
        self._features: list[Singles] = []

    def tune(self, index: int, draft: Draft) -> Mapping[str, npt.NDArray[Any]]:
        """The layer's tensors of the pack."""
        pairs = self.fit.pairs[index]
        fixed = np.round(self.values[index] / 2.0 ** draft.unit[:, None]).astype(np.int64)
        features = np.clip((fixed - draft.mean[:, None]) >> draft.feature_shift[:, None], -127, 127)
        self._features.append(features.astype(np.float32))
        depth = self.fit.facts.depth
        seen = np.concatenate([*self._features[-2 : -depth - 2 : -1], self._features[-1]])
        sums = (draft.weights.astype(np.float32) @ seen).astype(np.int64)
        up, down = np.maximum(draft.weight_shift, 0)[:, None], np.maximum(-draft.weight_shift, 0)[:, None]
        rest = (fixed - ((sums << up) >> down)).astype(np.float64)
        alone = index == 0 and self.fit.facts.alone
        new = self._seen < 0 if alone else np.ones(rest.shape[1], bool)
        offset = np.median(rest[:, new], axis=1) if alone else rest.mean(axis=1)
        rest -= offset[:, None]
        scale = np.sqrt((rest[:, new] ** 2).mean(axis=1)) + 1.0
        values = pairs[:, 0] >= self._keys(index)
        repeats, factor = self._repeats(rest / scale[:, None], values.repeat(2))
        scale = scale * factor
        memory_shift = np.clip(np.round(np.log2(scale / 16)), 0, 16)
        if index == 0:
            self.known = self._known(fixed, pairs) if alone else np.zeros((len(pairs), 2, 64), np.uint8)
        channels = np.stack(
            [
                draft.mean,
                np.clip(np.round(offset), -(2**28), 2**28),
                draft.feature_shift,
                draft.weight_shift,
                memory_shift,
            ],
            axis=1,
        )
        form = self.fit.grid.format
        return {
            "pairs": pairs.astype(np.int32),
            "weights": draft.weights,
            "channels": channels.astype(np.int32),
            "origin": np.clip(draft.unit[::2] + form.bias + form.mantissa + 1, -1024, 1024).astype(np.int16),
            "classes": _classes(scale, pairs, len(self.fit.angles)),
            "repeats": repeats,
        }

    def _keys(self, index: int) -> int:
        layer = self.fit.facts.layers[index]
        return layer.heads * layer.key_dim

    def _repeats(self, rest: Reals, values: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int16], Reals]:
        """Gains and narrowings of repeats [2, orders, 2]; how the scale of tokens without one differs, [channels]."""
        repeats, factor = np.zeros((2, len(LENGTHS) + 1, 2), np.int16), np.ones(len(values))
        for part, rows in enumerate((~values, values)):
            fresh = self.order == 0
            base = max(float((rest[rows][:, fresh] ** 2).mean()), 1e-12) if fresh.sum() >= 20 else 1.0
            factor[rows] = np.sqrt(base)
            for order in range(1, len(LENGTHS) + 1):
                at = np.flatnonzero(self.order == order)
                if len(at) < 20:  # too few to learn from: as the next shorter context
                    repeats[part, order] = repeats[part, order - 1]
                    continue
                now = rest[rows][:, at]
                then = np.clip(rest[rows][:, self.position[at]], -REMEMBERED / 16, REMEMBERED / 16)
                gain = np.clip(np.round(64 * (now * then).sum() / ((then * then).sum() + 1e-9)), 0, 64)
                left = ((now - gain / 64 * then) ** 2).mean() / base
                repeats[part, order] = gain, np.clip(np.round(4 * np.log2(left + 1e-6)), -64, 64)
        return repeats, factor

    def _known(self, fixed: Integers, pairs: Integers) -> npt.NDArray[np.uint8]:
        """The scale at which a token repeats itself where nothing but the token counts."""
        at = np.flatnonzero(self._seen >= 0)
        if not len(at):
            return _classes(np.full(len(fixed), 2.0**SCALE), pairs, len(self.fit.angles))
        apart = np.abs(fixed[:, at] - fixed[:, self._seen[at]]).astype(np.float64)
        cap = 30 * np.median(apart, axis=1, keepdims=True) + 30
        return _classes(np.sqrt((np.minimum(apart, cap) ** 2).mean(axis=1)) + 1, pairs, len(self.fit.angles))


def _layer(sample: Sample, index: int) -> Sequence[Array]:
    return sample.tensors[2 * index : 2 * index + 2]


def read_numbers(bits: Array, dtype: FloatType) -> Singles:
    """The float32 values of a dtype's bit patterns; what is not finite becomes zero."""
    match dtype:
        case "BF16":
            numbers = (bits.astype(np.uint32) << 16).view(np.float32)
        case "F16":
            numbers = bits.view(np.float16).astype(np.float32)
        case "F32":
            numbers = bits.view(np.float32)
    return np.nan_to_num(numbers, nan=0.0, posinf=0.0, neginf=0.0)


def _pairs(layer: PackLayer, rotations: tuple[Rotation, Rotation], still: int) -> Integers:
    """A layer's channels in coding order: [pairs, 3] with the row of the angles; row `still` does not turn."""
    keys = _part_pairs(layer.heads, layer.key_dim, rotations[0], still)
    values = _part_pairs(layer.heads, layer.value_dim, rotations[1], still)
    values[:, :2] += layer.heads * layer.key_dim
    return np.concatenate([keys, values])


def _part_pairs(heads: int, dim: int, rotation: Rotation, still: int) -> Integers:
    """The pairs of keys or of values, those that turn first."""
    turning = {int(channel) for channel in rotation.planes.ravel()}
    rest = [channel + head * dim for head in range(heads) for channel in range(dim) if channel not in turning]
    planes = [(int(a), int(b), int(f)) for (a, b), f in zip(rotation.planes, rotation.frequency, strict=True)]
    pairs = [(a + head * dim, b + head * dim, f) for head in range(heads) for a, b, f in planes]
    pairs += [(a, b, still) for a, b in zip(rest[::2], rest[1::2], strict=True)]
    return np.array(pairs, np.int64).reshape(-1, 3)


def _classes(scale: Reals, pairs: Integers, still: int) -> npt.NDArray[np.uint8]:
    """The classes [pairs, 2, 64] of rotated channels by the middle of each 64th of the squared cosine."""
    a, b = scale[::2, None] ** 2, scale[1::2, None] ** 2
    square = np.where(pairs[:, 2:] == still, 1.0, (np.arange(64) + 0.5) / 64)
    both = np.stack([square * a + (1 - square) * b, (1 - square) * a + square * b], axis=1)
    return np.clip(np.round(4 * np.log2(both)), *CLASSES).astype(np.uint8)


def _distributions() -> npt.NDArray[np.int32]:
    """Four parts Gaussian, one part Student's t with 4 degrees of freedom, of variance 1; for keys and values."""
    z = np.linspace(-8, 8, 1025)
    gauss = np.array([0.5 * (1 + erf(x / np.sqrt(2))) for x in z])
    t = z * np.sqrt(2)  # 4 degrees of freedom have variance 2
    student = 0.5 + 0.375 * t / np.sqrt(1 + t * t / 4) * (1 - t * t / (12 * (1 + t * t / 4)))
    mixed = 0.8 * gauss + 0.2 * student
    whole = np.round((mixed - mixed[0]) / (mixed[-1] - mixed[0]) * TAIL).astype(np.int32)
    return np.stack([whole, whole])


def _energy() -> npt.NDArray[np.int16]:
    """The change of class at a 256th of an energy: 8 classes an octave, at most three octaves."""
    ratio = np.maximum(np.arange(512), 1) * 256 / STEADY
    return np.clip(np.round(8 * np.log2(ratio)), -24, 24).astype(np.int16)


def _rotation(angles: Reals) -> dict[str, npt.NDArray[np.int32]]:
    def turns(positions: Integers) -> npt.NDArray[np.int32]:
        at = positions[:, None] * angles[None]
        return np.round(2.0**30 * np.stack([np.cos(at), np.sin(at)], axis=-1)).astype(np.int32)

    return {"rotation.coarse": turns(np.arange(0, LONGEST, 64)), "rotation.fine": turns(np.arange(64))}
