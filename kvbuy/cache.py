"""Caches: between a transformers `Cache` and the tensors of an artifact. Alone in knowing transformers' caches.

Full-attention layers get buffers of our own, allocated once for document, prompt and answer: blocks are read straight
into them, decoding appends in place. Sliding-window and recurrent layers stay transformers' own, filled at the edge.
Any other kind is refused by name. It does not know files' bytes, prompts or sampling.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from kvbuy.artifact import Artifact, content_digest
from kvbuy.codec.arrays import Array, head_views, shaped_block
from kvbuy.errors import DamagedError, UnsupportedCache, UsageError
from kvbuy.manifest import FloatType, FullLayer, Layer, Manifest, RecurrentLayer, SlidingLayer, StateTensor
from kvbuy.parallel import in_order
from kvbuy.reader import Reader, read_state

Reuse = Literal["continue", "align"]
DTYPES: dict[FloatType, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES: dict[torch.dtype, FloatType] = {dtype: name for name, dtype in DTYPES.items()}


class BufferedLayer(DynamicLayer):  # type: ignore[misc]
    """A full-attention layer that appends into buffers allocated once.

    `keys` and `values`, [batch, heads, tokens, dim], are views of the buffers' first rows. Whoever replaces them (beam
    search, batch expansion) or outgrows the capacity gets new buffers of twice the rows.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def reserve(self, layer: FullLayer, *, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the buffers before the first token."""
        key = torch.zeros((1, layer.heads, 0, layer.key_dim), dtype=dtype, device=device)
        value = torch.zeros((1, layer.heads, 0, layer.value_dim), dtype=dtype, device=device)
        self.lazy_initialization(key, value)

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The key and value buffers, [batch, heads, capacity, dim]."""
        if self._buffers is None:
            raise AssertionError("the layer has not seen a token yet")
        return self._buffers

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers that fit the states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, heads, rows, dim]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        replaced = self.keys.untyped_storage().data_ptr() != self.buffers()[0].untyped_storage().data_ptr()
        if end > self.capacity or replaced:
            keys, values = self.keys, self.values
            self.capacity = self.capacity if end <= self.capacity else 2 * end
            self._allocate(keys, values)
            for buffer, old in zip(self.buffers(), (keys, values), strict=True):
                buffer[:, :, :start] = old
        for buffer, new in zip(self.buffers(), (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.show(end)
        return self.keys, self.values

    def show(self, rows: int) -> None:
        """Make the first `rows` rows of the buffers the layer's contents."""
        self.keys, self.values = (buffer[:, :, :rows] for buffer in self.buffers())

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        key, value = (
            states.new_empty((*states.shape[:2], self.capacity, states.shape[-1])) for states in (keys, values)
        )
        self._buffers = (key, value)
        self.show(0)


def empty_cache(config: PreTrainedConfig, *, capacity: int) -> Cache:
    """An empty cache for a model, with room for `capacity` tokens.

    Raises:
        UnsupportedCache: a layer keeps something that an artifact cannot store.
    """
    if config.is_encoder_decoder:
        raise UnsupportedCache(f"{config.model_type} is an encoder-decoder; kvbuy stores decoder-only models")
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        raise UnsupportedCache(f"{config.model_type} has layers of the unknown kind {error}") from error
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer):
            raise UnsupportedCache(
                f"{config.model_type} keeps a {type(layer).__name__}, which an artifact cannot store"
            )
    return Cache(layers=[BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in layers])


def refuse_unfilled(cache: Cache, *, model_type: str) -> None:
    """Raise UnsupportedCache where a model that has run left a layer of the cache empty."""
    for index, layer in enumerate(cache.layers):
        recurrent = isinstance(layer, LinearAttentionLayer)
        if not (any(layer.has_previous_state.values()) if recurrent else layer.is_initialized):
            raise UnsupportedCache(f"{model_type} left layer {index} of its cache empty: it keeps its state elsewhere")


def describe_layers(cache: Cache) -> tuple[Layer, ...]:
    """The manifest's `layers` for a cache that a model has filled."""
    return tuple(_describe(layer) for layer in cache.layers)


def reserve_cache(
    config: PreTrainedConfig, manifest: Manifest, *, capacity: int, device: torch.device, touch: bool = False
) -> Cache:
    """An empty cache whose buffers are allocated, ready for `load_artifact`.

    `touch` them ahead where there is time for it: a read into untouched memory takes twice as long.
    """
    refuse_foreign_layers(config, manifest)
    cache = empty_cache(config, capacity=capacity)
    if len(_full_layers(cache)) != sum(layer.kind == "full" for layer in manifest.layers):
        raise DamagedError("the artifact has other kinds of layers than the model")
    for layer, described in zip(_full_layers(cache), (x for x in manifest.layers if x.kind == "full"), strict=True):
        assert isinstance(described, FullLayer)  # kind says so
        layer.reserve(described, dtype=DTYPES[manifest.fingerprint.dtype], device=device)
        for buffer in layer.buffers() if touch else ():
            buffer.zero_()
    return cache


def refuse_foreign_layers(config: PreTrainedConfig, manifest: Manifest) -> None:
    """Say before buffers are allocated that an artifact's layers cannot be the model's (DamagedError).

    Bounds only: what the layers really are is known once the model runs (`kvbuy.models.refuse_foreign_shapes`).
    """
    text = config.get_text_config(decoder=True)
    if len(manifest.layers) != text.num_hidden_layers:
        raise DamagedError(f"the artifact has {len(manifest.layers)} layers, the model {text.num_hidden_layers}")
    heads = text.num_attention_heads
    widest = 4 * max(getattr(text, "head_dim", None) or 0, text.hidden_size // heads)  # latent attention widens heads
    for index, layer in enumerate(manifest.layers):
        if layer.kind == "full" and (layer.heads > heads or max(layer.key_dim, layer.value_dim) > widest):
            raise DamagedError(f"layer {index} is larger in the artifact than the model can make it")


def load_artifact(artifact: Artifact, cache: Cache, *, reuse: Reuse, device: torch.device) -> int:
    """Fill a reserved cache from an artifact, every digest checked; returns the number of cached tokens.

    With "continue" that is the whole document, with "align" its full blocks.

    Raises:
        DamagedError: a digest does not match; the cache is of no use then.
        UsageError: "align" on a model whose recurrent state is stored at the document's end only.
    """
    manifest = artifact.manifest
    tokens = manifest.document.tokens
    if reuse == "align":
        tokens -= tokens % manifest.profile.block_size
    reader = Reader.open(artifact)
    buffers = [buffer[0] for layer in _full_layers(cache) for buffer in layer.buffers()]
    arrays = [_array(buffer) for buffer in buffers] if device.type == "cpu" else []
    blocks = range(-(-tokens // manifest.profile.block_size))
    for _ in in_order(lambda index: _load_block(reader, index, buffers, arrays), blocks):
        pass
    rewind_cache(artifact, cache, tokens=tokens, device=device)
    return tokens


def rewind_cache(artifact: Artifact, cache: Cache, *, tokens: int, device: torch.device) -> None:
    """Put a loaded cache back to the document's first `tokens` tokens: views shrink, small state is read again."""
    for layer in cache.layers:
        if isinstance(layer, BufferedLayer):
            layer.show(tokens)
        else:
            layer.reset()
    if tokens:
        _load_state(artifact, cache, tokens=tokens, device=device)


def block_digest(cache: Cache, start: int, end: int) -> str:
    """The content digest of tokens [start, end) of the cache's full-attention layers."""
    return content_digest(head_views(block_arrays(cache, start, end)))


def block_arrays(cache: Cache, start: int, end: int) -> list[Array]:
    """Tokens [start, end) of the cache's full-attention layers, [heads, rows, dim] each, in file order."""
    return [_array(buffer[0, :, start:end]) for layer in _full_layers(cache) for buffer in layer.buffers()]


def fill_rows(cache: Cache, arrays: Sequence[Array], start: int) -> None:
    """Write the full-attention layers' rows from `start` on: arrays [heads, rows, dim] in file order."""
    buffers = (buffer for layer in _full_layers(cache) for buffer in layer.buffers())
    for array, buffer in zip(arrays, buffers, strict=True):
        rows = torch.from_numpy(array).view(buffer.dtype)
        buffer[0, :, start : start + rows.shape[1]] = rows


def full_rows(cache: Cache) -> Iterator[torch.Tensor]:
    """Keys and values of the full-attention layers, [heads, tokens, dim], in file order: views, not copies."""
    for layer in _full_layers(cache):
        yield layer.keys[0]
        yield layer.values[0]


def record_windows(cache: Cache) -> None:
    """Keep the rows that slide out of windows from now on: before the last short block, for aligned reuse."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()


def forget_windows(cache: Cache) -> None:
    """Undo `record_windows`: windows slide again, and hold what continuing needs."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.record_past:
            layer.crop(0)
            layer.record_past = False


def state_tensors(cache: Cache) -> Iterator[tuple[StateTensor, memoryview]]:
    """The state at the document's end, described and as bytes, in file order."""
    for index, layer in enumerate(cache.layers):
        for name, tensor in sorted(_layer_state(layer).items()):
            stored = tensor[0].clone(memory_format=torch.contiguous_format)  # the model goes on with the original
            raw = _bytes(stored)
            shape, dtype = tuple(stored.shape), NAMES[stored.dtype]
            yield StateTensor(layer=index, name=name, dtype=dtype, shape=shape, digest=content_digest([raw])), raw


def _full_layers(cache: Cache) -> list[BufferedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, BufferedLayer)]


def _describe(layer: object) -> Layer:
    match layer:
        case BufferedLayer():
            key, value = layer.buffers()
            return FullLayer(kind="full", heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3])
        case DynamicSlidingWindowLayer():
            return SlidingLayer(kind="sliding", window=layer.sliding_window)
        case _:
            return RecurrentLayer(kind="recurrent")


def _layer_state(layer: object) -> dict[str, torch.Tensor]:
    match layer:
        case DynamicSlidingWindowLayer():
            return {"key": layer.keys, "value": layer.values}
        case LinearAttentionLayer():
            conv = {f"conv.{at}": state for at, state in layer.conv_states.items() if state is not None}
            recurrent = {f"recurrent.{at}": state for at, state in layer.recurrent_states.items() if state is not None}
            return conv | recurrent
        case _:
            return {}


def _load_block(reader: Reader, index: int, buffers: list[torch.Tensor], arrays: list[Array]) -> None:
    """Read a block into the buffers: straight where they are `arrays` of this machine, else through a pinned stage."""
    manifest = reader.artifact.manifest
    start = manifest.block_start(index)
    end = start + manifest.blocks[index].tokens
    if arrays or not buffers:
        reader.read_block(index, [array[:, start:end] for array in arrays])
        return
    first, last = manifest.block_span(index)
    with reader.in_turn():
        stage = torch.empty(last - first, dtype=torch.uint8, pin_memory=buffers[0].is_cuda)
        reader.read_block(index, shaped_block(_bytes(stage), manifest.block_tensors(index)))
    for tensor, buffer in zip(manifest.block_tensors(index), buffers, strict=True):
        piece = stage[tensor.start - first :][: tensor.size].view(buffer.dtype).view(tensor.shape)
        buffer[:, start:end].copy_(piece, non_blocking=True)
    if buffers[0].is_cuda:
        torch.cuda.current_stream(buffers[0].device).synchronize()  # the stage is free to go


def _load_state(artifact: Artifact, cache: Cache, *, tokens: int, device: torch.device) -> None:
    manifest = artifact.manifest
    beyond = manifest.document.tokens - tokens  # rows of the last short block, which aligned reuse runs again
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, stored in enumerate(manifest.state):
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        read_state(artifact, index, _bytes(tensor))
        state.setdefault(stored.layer, {})[stored.name] = tensor[None].to(device)
    for at, tensors in state.items():
        layer = cache.layers[at]
        if isinstance(layer, DynamicSlidingWindowLayer):
            _fill_window(layer, tensors["key"], tensors["value"], tokens=tokens, beyond=beyond)
        elif beyond:
            raise UsageError(
                "aligned reuse needs the state at a block's end; this model's recurrent state is stored at the "
                "document's end only",
                hint="use --reuse continue",
            )
        else:
            _fill_recurrent(layer, tensors)


def _fill_window(
    layer: DynamicSlidingWindowLayer, keys: torch.Tensor, values: torch.Tensor, *, tokens: int, beyond: int
) -> None:
    layer.lazy_initialization(keys, values)
    rows = keys.shape[-2] - beyond
    first = max(0, rows - layer.sliding_window + 1)
    layer.keys, layer.values = keys[:, :, first:rows].contiguous(), values[:, :, first:rows].contiguous()
    layer.cumulative_length = tokens


def _fill_recurrent(layer: LinearAttentionLayer, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        kind, _, number = name.partition(".")
        at = int(number)
        if kind == "conv":
            layer.lazy_initialization(conv_states=tensor, state_idx=at)
            layer.conv_states[at].copy_(tensor)
        else:
            layer.lazy_initialization(recurrent_states=tensor, state_idx=at)
            layer.recurrent_states[at].copy_(tensor)
        layer.has_previous_state[at] = True


def _array(tensor: torch.Tensor) -> Array:
    """A tensor's bits as unsigned integers; without a copy where it is in this machine's memory."""
    words = torch.uint16 if tensor.itemsize == 2 else torch.uint32
    return tensor.detach().cpu().view(words).numpy()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor; without a copy where it is in this machine's memory."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
