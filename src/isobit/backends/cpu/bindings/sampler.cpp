// The Python class isobit.backends.cpu._cpu.Sampler: checks what comes in, then works on rows in
// parallel with the GIL released.

#include <nanobind/stl/optional.h>

#include <atomic>
#include <mutex>
#include <optional>

#include "module.h"
#include "../sampling/sampler.h"
#include "../engine/threads.h"

using namespace isobit;

namespace {

class PySampler {
public:
    PySampler(const std::string& simd, int threads) : team_(threads) {
        const Kernels& kernels = kernels_named(simd);
        for (int i = 0; i < team_.size(); ++i) samplers_.emplace_back(kernels);
    }

    void choose(Input_<float, 2> logits, Input_<float, 1> temperature, Input_<int32_t, 1> top_k,
                Input_<uint64_t, 1> top_p, Input_<float, 1> min_p, Input_<uint64_t, 1> seed,
                Input_<uint64_t, 1> index, Input_<int32_t, 1> edit_ends,
                Input_<int32_t, 1> edit_ids, Input_<float, 1> edit_logits,
                std::optional<Input_<uint32_t, 2>> allowed,
                Array<int32_t, 1> tokens) {
        const size_t R = logits.shape(0), V = logits.shape(1), words = (V + 31) / 32;
        require(V > 0 && temperature.shape(0) == R && top_k.shape(0) == R && top_p.shape(0) == R &&
                    min_p.shape(0) == R && seed.shape(0) == R && index.shape(0) == R &&
                    edit_ends.shape(0) == R && tokens.shape(0) == R,
                "choose: expected a value for each row");
        require(edit_ids.shape(0) == edit_logits.shape(0), "choose: expected a logit an edit");
        int32_t last = 0;
        for (size_t i = 0; i < R; last = edit_ends.data()[i++])
            require(edit_ends.data()[i] >= last, "choose: edits out of order");
        require((size_t)last == edit_ids.shape(0), "choose: edits beyond the rows");
        for (int32_t i = 0; i < last; ++i)
            require(edit_ids.data()[i] >= 0 && edit_ids.data()[i] < (int32_t)V,
                    "choose: id out of range");
        require(!allowed || (allowed->shape(0) == R && allowed->shape(1) == words),
                "choose: expected allowed [rows, vocabulary / 32]");
        each(R, [&](RowSampler& sampler, int i) {
            const Sampling s = {temperature.data()[i], top_k.data()[i], top_p.data()[i],
                                min_p.data()[i],       seed.data()[i],  index.data()[i]};
            const int32_t first = i ? edit_ends.data()[i - 1] : 0;
            const Edits edits = {edit_ids.data() + first, edit_logits.data() + first,
                                 edit_ends.data()[i] - first,
                                 allowed ? allowed->data() + i * words : nullptr};
            tokens.data()[i] = sampler.choose(logits.data() + i * V, (int)V, s, edits);
        });
    }

    void measure(Input_<float, 2> logits, Input_<int32_t, 2> ids, Array<int32_t, 1> argmax,
                 Array<float, 2> values, Array<int32_t, 2> top_ids, Array<float, 2> top_values) {
        const size_t R = logits.shape(0), V = logits.shape(1), n = ids.shape(1);
        const size_t k = top_ids.shape(1);
        require(ids.shape(0) == R && argmax.shape(0) == R && values.shape(0) == R &&
                    values.shape(1) == n && top_ids.shape(0) == R && top_values.shape(0) == R &&
                    top_values.shape(1) == k && V > 0 && k <= V,
                "measure: shapes differ");
        for (size_t i = 0; i < ids.size(); ++i)
            require(ids.data()[i] >= 0 && ids.data()[i] < (int32_t)V, "measure: id out of range");
        each(R, [&](RowSampler& sampler, int i) {
            argmax.data()[i] = sampler.measure(
                logits.data() + i * V, (int)V, ids.data() + i * n, (int)n, values.data() + i * n,
                (int)k, top_ids.data() + i * k, top_values.data() + i * k);
        });
    }

    void digest(Input_<uint8_t, 2> rows, Array<uint8_t, 2> digests) {
        const size_t R = rows.shape(0), n = rows.shape(1);
        require(digests.shape(0) == R && digests.shape(1) == DIGEST_BYTES, "digest: shapes differ");
        each(R, [&](RowSampler& sampler, int i) {
            sampler.digest(rows.data() + i * n, n, digests.data() + i * DIGEST_BYTES);
        });
    }

private:
    template <class F>
    void each(size_t rows, F&& f) {
        nb::gil_scoped_release nogil;
        std::lock_guard<std::mutex> lock(mutex_);
        if (rows == 1) {  // not worth waking the others
            FloatMode mode;
            f(samplers_[0], 0);
            return;
        }
        std::atomic<int> next = 0;
        team_.run((int)rows, [&](int thread) {
            for (int i; (i = next.fetch_add(1)) < (int)rows;) f(samplers_[thread], i);
        });
    }

    std::mutex mutex_;  // callers may be several threads, scratch memory is one
    Team team_;
    std::vector<RowSampler> samplers_;
};

}  // namespace

void bind_sampler(nb::module_& m) {
    nb::class_<PySampler>(m, "Sampler")
        .def(nb::init<const std::string&, int>())
        .def("choose", &PySampler::choose, nb::arg("logits"), nb::arg("temperature"),
             nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("seed"),
             nb::arg("index"), nb::arg("edit_ends"), nb::arg("edit_ids"), nb::arg("edit_logits"),
             nb::arg("allowed").none(), nb::arg("tokens"))
        .def("measure", &PySampler::measure)
        .def("digest", &PySampler::digest);
}
