// Every launcher of csrc/cuda at small awkward sizes, with no byte to spare: for the sanitizers.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../../csrc/cuda/api.h"
#include "../../../csrc/cuda/portable.h"

using namespace fastminima::cuda;

namespace {

template <typename T>
T number(int i) {
  T value;
  narrow(wide_t<T>((i * 37 % 101) / 50.0 - 1), value);
  return value;
}

// `size` values of which the first lies `shift` elements behind a 16-byte boundary.
template <typename T>
struct Buffer {
  std::vector<T> values;
  int shift;
  Buffer(int64_t size, int s = 0) : values(size_t(size + s)), shift(s) {
    for (size_t i = 0; i < values.size(); i++) values[i] = number<T>(int(i));
  }
  T* data() { return values.data() + shift; }
  int64_t address() { return reinterpret_cast<int64_t>(data()); }
};

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("not finite: %s\n", what);
  std::exit(7);
}

#define VECTOR_CASES(scalar_t, suffix)                                                            \
  void vector_##suffix(int64_t n, int shift, int64_t count) {                                     \
    Buffer<scalar_t> w(n, shift), v(n, shift), u(n, shift), next(n, shift);                       \
    std::vector<Buffer<scalar_t>> basis(size_t(count), Buffer<scalar_t>(n, shift));               \
    std::vector<int64_t> rows;                                                                    \
    for (auto& b : basis) rows.push_back(b.address());                                            \
    double beta = 0.5;                                                                            \
    std::vector<double> partials(size_t(vector_partials(n, 2))), result(size_t(count + 3));       \
    std::vector<double> more(size_t(vector_partials(n, count)));                                  \
    lanczos_step_##suffix(w.data(), v.data(), u.data(), &beta, n, partials.data(), result.data(), \
                          nullptr);                                                               \
    lanczos_step_##suffix(w.data(), v.data(), nullptr, &beta, n, partials.data(), result.data(),  \
                          nullptr);                                                               \
    power_step_##suffix(w.data(), v.data(), 0.1, n, next.data(), partials.data(), result.data(),  \
                        nullptr);                                                                 \
    require(result[2] == result[2], "power_step");                                                \
    dots_##suffix(w.data(), rows.data(), count, n, more.data(), result.data(), nullptr);          \
    project_out_##suffix(w.data(), rows.data(), count, n, more.data(), result.data(), nullptr);   \
    std::vector<scalar_t> weights(size_t(count * 3), scalar_t(0.25)), out(size_t(3 * n));         \
    linear_combinations_##suffix(rows.data(), count, weights.data(), 3, n, out.data(), n,         \
                                 nullptr);                                                        \
  }
VECTOR_CASES(float, f32)
VECTOR_CASES(double, f64)

#define TENSOR_CASES(scalar_t, suffix)                                                           \
  void moving_##suffix(const std::vector<int64_t>& grads, const std::vector<int64_t>& sizes,     \
                       int shift) {                                                              \
    std::vector<Buffer<scalar_t>> buffers;                                                       \
    std::vector<int64_t> p, v, places(sizes.size(), int64_t(5) << 40);                           \
    const int64_t count = int64_t(sizes.size());                                                 \
    for (int64_t n : sizes) buffers.emplace_back(n, shift), buffers.emplace_back(n, shift);      \
    for (size_t k = 0; k < buffers.size(); k++) (k % 2 ? v : p).push_back(buffers[k].address()); \
    langevin_step_##suffix(p.data(), grads.data(), v.data(), places.data(), sizes.data(), count, \
                           0.1, 0.9, 0.2, -1, 4, nullptr);                                       \
    langevin_step_##suffix(p.data(), grads.data(), nullptr, places.data(), sizes.data(), count,  \
                           0.1, 0, 0.2, 3, 4, nullptr);                                          \
    for (auto& b : buffers)                                                                      \
      for (scalar_t x : b.values) require(widen(x) == widen(x), "langevin_step");                \
  }                                                                                              \
  void tensors_##suffix(const std::vector<int64_t>& sizes, int shift) {                          \
    std::vector<Buffer<scalar_t>> buffers;                                                       \
    std::vector<int64_t> x;                                                                      \
    const int64_t count = int64_t(sizes.size());                                                 \
    for (int64_t n : sizes) buffers.emplace_back(n, shift);                                      \
    for (auto& b : buffers) x.push_back(b.address());                                            \
    std::vector<double> partials(size_t(multi_partials(sizes.data(), count)));                   \
    double result;                                                                               \
    multi_sq_norm_##suffix(x.data(), sizes.data(), count, partials.data(), &result, nullptr);    \
    require(result >= 0, "multi_sq_norm");                                                       \
    moving_##suffix(x, sizes, shift);                                                            \
  }                                                                                              \
  void embedding_##suffix(int64_t batch, int64_t time, int64_t width, int shift) {               \
    using wide = wide_t<scalar_t>;                                                               \
    Buffer<scalar_t> g(batch * time * width, shift);                                             \
    Buffer<wide> table(7 * width, shift);                                                        \
    std::vector<int64_t> ids(size_t(batch * time));                                              \
    for (size_t i = 0; i < ids.size(); i++) ids[i] = int64_t(i * i * 5 % 7);                     \
    std::vector<int64_t> words(size_t(sort_words(batch, time)));                                 \
    std::vector<int64_t> all(size_t(sort_words(1, batch * time)));                               \
    std::vector<double> partials(size_t(embedding_partials(batch, time, width)));                \
    std::vector<wide> norms(size_t(batch), wide(-1)), moment(size_t(7 * width));                 \
    sort_steps(ids.data(), time, 1, batch, time, time, 3, words.data(), nullptr);                \
    embedding_sq_norms_##suffix(words.data(), g.data(), time * width, width, batch, time, width, \
                                partials.data(), norms.data(), nullptr);                         \
    for (wide norm : norms) require(norm >= 0, "embedding_sq_norms");                            \
    sort_steps(ids.data(), time, 1, 1, batch * time, time, 3, all.data(), nullptr);              \
    embedding_second_moment_##suffix(all.data(), g.data(), time * width, width, batch, time,     \
                                     width, moment.data(), nullptr);                             \
    std::vector<double> dots(size_t(embedding_dot_partials(batch, time, width)));                \
    Buffer<scalar_t> narrow_table(7 * width, shift);                                             \
    for (int wide_too = 0; wide_too < 2; wide_too++) {                                           \
      const void* const v =                                                                      \
          wide_too ? static_cast<const void*>(table.data()) : narrow_table.data();               \
      embedding_dots_##suffix(ids.data(), time, 1, g.data(), time * width, width, batch, time,   \
                              width, 3, v, width, wide_too, dots.data(), norms.data(), nullptr); \
    }                                                                                            \
  }
TENSOR_CASES(float, f32)
TENSOR_CASES(double, f64)
TENSOR_CASES(Half, f16)
TENSOR_CASES(BFloat16, bf16)

}  // namespace

int main(int, char** arguments) {
  // ThreadSanitizer takes half a millisecond for each thread of each block.
  const bool all = arguments[1][0] == 'a';
  for (int shift = 0; shift < (all ? 2 : 1); shift++) {
    for (int64_t n : {0, 1, 37, 2051, 8195})
      if (all || n == 2051) vector_f32(n, shift, 2);
    tensors_f32({5, 0, 2051, 3}, shift);
    embedding_f32(2, 37, 130, shift);
    embedding_bf16(2, 3, 16, shift);
    if (!all) continue;
    vector_f64(37, shift, 9);
    tensors_f64({1, 70}, shift), tensors_f16({130, 1}, shift), tensors_bf16({33, 7, 8}, shift);
    embedding_f64(1, 1, 1, shift), embedding_f16(1, 70, 9, shift);
  }
  if (all) embedding_f32(1, 4100, 3, 0);  // a merge of sorted runs
  std::printf("done\n");
}
