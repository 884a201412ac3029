"""The CUDA backend: a model's weights on one GPU, and the pass of docs/numerics.md, section 9."""

import time

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, GREEDY, I32, Backend, Batch, Memory, Tap
from isobit.backends.cuda import decode, decode_batch, memory
from isobit.backends.cuda.gpu import CudaGpu, Gpu
from isobit.backends.cuda.load import DeviceLayer, DeviceModel, Loader, load_layers, tall
from isobit.backends.cuda.ops import MMA_ROWS, Ops, Segments, span_length
from isobit.config import EngineConfig
from isobit.model.weights import Weights

_ROPE_STEP = 4096  # positions whose RoPE tables are computed at once


class _Trace:
    """Brings stages to a tap as a pass goes along."""

    def __init__(self, gpu: Gpu, tap: Tap | None, stages: frozenset[str] | None) -> None:
        self._gpu, self._tap, self._stages = gpu, tap, stages
        self.on = tap is not None

    def __call__(
        self, stage: str, layer: int | None, address: int, *shape: int, dtype: type = np.float32
    ) -> None:
        if self._tap is not None and (self._stages is None or stage in self._stages):
            value: NDArray[np.generic] = np.empty(shape, dtype)
            self._gpu.download(address, value)
            self._tap(stage, layer, value)


class CudaBackend(Backend):
    """Runs a batch of any composition; every stage can be traced."""

    name = "cuda"
    on_device = frozenset({GREEDY})

    def __init__(self, weights: Weights, engine: EngineConfig, gpu: Gpu | None = None) -> None:
        """Plan the memory, refuse what does not fit, load the weights.

        Raises BackendUnavailable with the reason. ``gpu`` is for tests.
        """
        self._c = c = weights.config
        self._gpu = gpu if gpu is not None else CudaGpu()
        try:
            free, _ = self._gpu.memory()
            super().__init__(weights, engine, lambda e: memory.room(weights, e, free))
            engine = self.engine
            self.plan = memory.Plan.of(weights, engine)
            self.plan.check(*self._gpu.memory())
            self._ops = Ops(self._gpu, engine.activation_planes)
            with Loader(self._gpu, self.plan.weights) as loader:
                self._embedding = loader.matrix(weights.token_embd)
                self._layers = load_layers(loader, weights)
                self._output_norm = loader.vector(weights.output_norm)
                self._output = loader.matrix(weights.output)
            self._shape = memory.CacheShape.of(c, engine)
            self._cache = self._gpu.allocate(c.n_layers * self._shape.nbytes)
            self._context = engine.context or c.context_length
            self._rope = self._gpu.allocate(self.plan.rope)
            self._rope_known = 0
            self._frequencies = numerics.inverse_frequencies(c.head_dim, c.rope_base)
            self._capacity = 0
            self._buffers: dict[str, int] = {}
            self._pages = (0, 0)  # address, bytes
            self._workspace = 0
            self._reserve(engine.chunk)
            self._decoder, self._batch_decoder = self._decoders(engine)
        except BaseException:
            self._gpu.close()
            raise

    @property
    def device(self) -> str:
        """The device in words."""
        return f"{self._gpu.name}, {self._gpu.multiprocessors} multiprocessors"

    def memory(self) -> Memory:
        """Of the device."""
        self._gpu.activate()
        return Memory(*self._gpu.memory())

    def read_bandwidth(self) -> float | None:
        """Bytes a second that the device reads from its memory: the best of six times eight passes.

        None where too little memory is free for a buffer that is far beyond any cache.
        """
        gpu, passes = self._gpu, 8
        gpu.activate()
        nbytes = min(1 << 30, gpu.memory()[0] // 2) // 16 * 16
        if nbytes < 256 << 20:
            return None
        buffer, out = gpu.allocate(nbytes), gpu.allocate(4)
        flag, best = np.empty(1, np.int32), float("inf")
        try:
            for _ in range(6):  # the first compiles
                gpu.download(out, flag)
                start = time.perf_counter()
                for _ in range(passes):
                    gpu.launch(
                        "bandwidth",
                        "read_all",
                        (8 * gpu.multiprocessors,),
                        (buffer, nbytes // 16, out),
                    )
                gpu.download(out, flag)
                best = min(best, time.perf_counter() - start)
        finally:
            gpu.free(buffer)
            gpu.free(out)
        return passes * nbytes / best

    def close(self) -> None:
        """Free the device's memory."""
        self._gpu.activate()
        self._gpu.close()

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        c, o, gpu = self._c, self._ops, self._gpu
        gpu.activate()
        n = len(batch.tokens)
        self._extend_rope(int(batch.positions.max()) + 1)
        if tap is None and (step := self._step_logits(batch)) is not None:
            return step
        self._reserve(n)
        b = self._buffers
        gpu.upload(b["tokens"], batch.tokens)
        gpu.upload(b["positions"], batch.positions)
        gpu.upload(b["sequence"], batch.sequence)
        pages = self._upload_pages(batch.pages)
        spans = self._upload_spans(batch.sequence)

        trace = _Trace(gpu, tap, stages)
        o.embed(self._embedding, b["tokens"], n, b["x"])
        trace("embedding", None, b["x"], n, c.hidden)
        for i, layer in enumerate(self._layers):
            self._attention_block(i, layer, n, pages, spans, trace)
            self._feed_forward_block(i, layer, n, trace)
        o.rms_norm(b["x"], self._output_norm, c.eps, c.hidden, n, b["h"])
        trace("final_norm", None, b["h"], n, c.hidden)
        logits = self._logits(batch.logit_rows)
        if tap is not None and (stages is None or "lm_head" in stages):
            tap("lm_head", None, logits)
        return logits

    def compute_greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None
    ) -> I32:
        """Decode steps whose logits stay on the device."""
        self._gpu.activate()
        n = len(tokens)
        if n == 1 and self._decoder is not None:
            self._extend_rope(int(positions[0]) + count)
            chosen, finite = self._decoder.greedy(
                int(tokens[0]), int(positions[0]), pages[0], count
            )
        elif self._batch_decoder is not None and n <= self._batch_decoder.most:
            self._extend_rope(int(positions.max()) + count)
            chosen, finite = self._batch_decoder.greedy(tokens, positions, pages, count)
        else:
            return super().compute_greedy(tokens, positions, pages, count, states)
        if not finite:  # once more, step by step: whose logits are not?
            return super().compute_greedy(tokens, positions, pages, count, states)
        return chosen.reshape(count, n)

    def _step_logits(self, batch: Batch) -> F32 | None:
        """Logits of a batch that is one step of decoding; None if it is something else."""
        n = len(batch.tokens)
        one_each = len(np.unique(batch.sequence)) == n
        if not one_each or not np.array_equal(batch.logit_rows, np.arange(n)):
            return None
        pages = batch.pages[batch.sequence]
        if n == 1 and self._decoder is not None:
            token, position = int(batch.tokens[0]), int(batch.positions[0])
            return self._decoder.logits(token, position, pages[0])[None]
        if n > 1 and self._batch_decoder is not None and n <= self._batch_decoder.most:
            return self._batch_decoder.logits(batch.tokens, batch.positions, pages)
        return None

    def _decoders(
        self, engine: EngineConfig
    ) -> tuple[decode.Decoder | None, decode_batch.BatchDecoder | None]:
        c, gpu = self._c, self._gpu
        if not decode.supported(c, self._layers, self._output, gpu):
            return None, None
        caches = [self._layer_cache(i)[:4] for i in range(c.n_layers)]
        rope = (self._rope, self._rope + self.plan.rope // 2)
        model = DeviceModel(
            self._layers,
            self._embedding,
            self._output,
            self._output_norm,
            caches,
            rope,
            self._context,
        )
        one = decode.Decoder(gpu, c, engine.activation_planes, model)
        if memory.in_step(engine) == 0 or not decode_batch.supported(c, model, gpu):
            return one, None
        return one, decode_batch.BatchDecoder(gpu, c, model, engine)

    def _attention_block(
        self,
        i: int,
        layer: DeviceLayer,
        n: int,
        pages: tuple[int, int],
        spans: int,
        trace: _Trace,
    ) -> None:
        c, o, b = self._c, self._ops, self._buffers
        q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        width = q_width + 2 * kv_width
        o.norm_quantise(b["x"], 0, layer.attn_norm, c.eps, c.hidden, n, b["h"], b["acts"])
        trace("attn_norm", i, b["h"], n, c.hidden)
        column = 0
        for w in tall((layer.q, layer.k, layer.v)):
            o.matmul(w, b["h"], b["acts"], b["qkv"] + 4 * column, n, row_stride=width)
            column += w.rows
        trace("qkv_matmul", i, b["qkv"], n, width)
        scale = float(numerics.attention_scale(c.head_dim))
        cos, sin = self._rope, self._rope + self.plan.rope // 2
        where = (b["positions"], b["sequence"], *pages)
        cache = self._layer_cache(i)
        vectors = n * (c.n_heads + 2 * c.n_kv_heads)
        roped = (b["q_rope"], b["k_rope"]) if trace.on else (0, 0)
        o.attention(
            "head_vectors",
            c.head_dim,
            (-(-vectors // 8),),
            (b["qkv"], layer.q_norm, layer.k_norm, c.eps, cos, sin, *where, c.n_heads)
            + (scale, *roped, b["q_int"], b["dq"], *cache, vectors),
        )
        trace("q_post_rope", i, b["q_rope"], n, c.n_heads, c.head_dim)
        trace("k_post_rope", i, b["k_rope"], n, c.n_kv_heads, c.head_dim)
        if spans:
            o.attention_mma(
                c,
                spans,
                (b["q_int"], b["dq"], *where, b["span_first"], b["span_count"])
                + (c.n_heads, *cache, b["attention"]),
            )
        else:
            o.attention(
                "attention",
                c.head_dim,
                (c.n_heads, n),
                (b["q_int"], b["dq"], *where, c.n_heads, *cache, b["attention"]),
            )
        trace("attention", i, b["attention"], n, q_width)
        o.quantise(b["attention"], q_width, n, b["acts"])
        o.matmul(layer.attn_output, b["attention"], b["acts"], b["out"], n)
        trace("attn_out", i, b["out"], n, c.hidden)

    def _feed_forward_block(self, i: int, layer: DeviceLayer, n: int, trace: _Trace) -> None:
        c, o, b = self._c, self._ops, self._buffers
        x, h, acts = b["x"], b["h"], b["acts"]
        o.norm_quantise(x, b["out"], layer.ffn_norm, c.eps, c.hidden, n, h, acts)
        trace("post_attn_residual", i, x, n, c.hidden)
        trace("ffn_norm", i, h, n, c.hidden)
        if layer.router is None:
            stage, k, into, out = "ffn_", 1, None, None
        else:
            stage, k = "moe_expert_", c.n_experts_used
            o.matmul(layer.router, h, acts, b["router_logits"], n)
            trace("moe_router_logits", i, b["router_logits"], n, c.n_experts)
            o.router_top_k(
                b["router_logits"],
                c.n_experts,
                k,
                c.normalise_experts,
                n,
                b["router_ids"],
                b["router_weights"],
            )
            trace("moe_router", i, b["router_weights"], n, k)
            trace("moe_router_indices", i, b["router_ids"], n, k, dtype=np.int32)
            o.sort_pairs(b["router_ids"], n * k, c.n_experts, b["order"], b["offset"])
            into = Segments(b["order"], b["offset"], k)
            out = Segments(b["order"], b["offset"], 1)
        shape = (n, k) if c.is_moe else (n,)
        gate, up = b["gate"], b["up"]
        o.gate_up(layer.gate, layer.up, h, acts, (gate, up), n * k, into)
        trace(stage + "gate", i, gate, *shape, c.ffn)
        trace(stage + "up", i, up, *shape, c.ffn)
        if trace.on or layer.down.layout.kind == "floats":
            o.swiglu(gate, up, n * k * c.ffn, b["swiglu"])
            trace(stage + "swiglu", i, b["swiglu"], *shape, c.ffn)
        o.swiglu_quantise(gate, up, c.ffn, n * k, acts)
        target = "expert_out" if c.is_moe else "out"
        o.matmul(layer.down, b["swiglu"], acts, b[target], n * k, segments=out)
        trace(stage + "out", i, b[target], *shape, c.hidden)
        if c.is_moe:
            weights, together = b["router_weights"], b["out"] if trace.on else 0
            o.combine(weights, b["expert_out"], k, c.hidden, n, together, x)
            trace("moe_ffn_out", i, b["out"], n, c.hidden)
        else:
            o.add(x, b["out"], n * c.hidden, x)
        trace("post_ffn_residual", i, x, n, c.hidden)

    def _logits(self, rows: I32) -> F32:
        """Logits of normed rows, some at a time."""
        c, o, b = self._c, self._ops, self._buffers
        logits = np.empty((len(rows), c.vocab), np.float32)
        step = min(memory.LOGIT_ROWS, self._capacity)
        for start in range(0, len(rows), step):
            part = np.ascontiguousarray(rows[start : start + step])
            self._gpu.upload(b["logit_rows"], part)
            o.gather(b["h"], b["logit_rows"], len(part), c.hidden, b["final"])
            o.quantise(b["final"], c.hidden, len(part), b["acts"])
            o.matmul(self._output, b["final"], b["acts"], b["logits"], len(part))
            self._gpu.download(b["logits"], logits[start : start + step])
        return logits

    def _layer_cache(self, layer: int) -> tuple[int, ...]:
        """K, V, their scales, heads and padded width, as the kernels of attention.cu take them."""
        s = self._shape
        k = self._cache + layer * s.nbytes
        v = k + memory.aligned(s.plane_bytes)
        dk = v + memory.aligned(s.plane_bytes)
        dv = dk + memory.aligned(s.scale_bytes)
        return k, v, dk, dv, s.heads, s.padded

    def _reserve(self, tokens: int) -> None:
        """Have buffers for that many tokens."""
        if tokens <= self._capacity:
            return
        sizes = memory.workspace(self._c, tokens)
        if self._workspace:
            self._gpu.free(self._workspace)
            self._capacity, self._workspace = 0, 0
        self._workspace = address = self._gpu.allocate(sum(map(memory.aligned, sizes.values())))
        for name, nbytes in sizes.items():
            self._buffers[name] = address
            address += memory.aligned(nbytes)
        self._capacity = tokens

    def _upload_spans(self, sequence: I32) -> int:
        """Cut the batch into the spans of attention_mma.cu; how many, 0 if that does not pay."""
        length = span_length(self._c)
        starts = np.flatnonzero(np.diff(sequence, prepend=-1))
        ends = np.append(starts[1:], len(sequence))
        if not length or int((ends - starts).max()) < MMA_ROWS:
            return 0
        first = np.concatenate([np.arange(s, e, length) for s, e in zip(starts, ends, strict=True)])
        limit = np.repeat(ends, -(-(ends - starts) // length))
        self._gpu.upload(self._buffers["span_first"], first.astype(np.int32))
        count = np.minimum(limit - first, length)
        self._gpu.upload(self._buffers["span_count"], count.astype(np.int32))
        return len(first)

    def _upload_pages(self, pages: I32) -> tuple[int, int]:
        """The page tables on the device: their address, and entries of one sequence."""
        address, room = self._pages
        if pages.nbytes > room:
            if room:
                self._gpu.free(address)
            room = 2 * pages.nbytes
            address = self._gpu.allocate(room)
            self._pages = address, room
        self._gpu.upload(address, pages)
        return address, pages.shape[1]

    def _extend_rope(self, end: int) -> None:
        """Have RoPE tables for positions below ``end``."""
        while self._rope_known < end:
            start = self._rope_known
            stop = min(start + _ROPE_STEP, self._context)
            offset = 4 * start * (self._c.head_dim // 2)
            for i, table in enumerate(numerics.rope_table(self._frequencies, start, stop)):
                self._gpu.upload(self._rope + i * (self.plan.rope // 2) + offset, table)
            self._rope_known = stop
