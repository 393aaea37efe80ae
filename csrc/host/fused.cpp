#include "host/fused.h"

#include <algorithm>

#include "host/typed.h"

namespace fastminima {
namespace host {
namespace {

template <typename scalar_t>
class FusedSequences : public OverTime<scalar_t> {
 public:
  FusedSequences(int64_t node, const std::string& saved, Places places, Layout layout,
                 const FusedDense& known, const std::string& isa)
      : OverTime<scalar_t>(node, {saved}, places, layout, isa), known_(known) {}

 public:
  bool minds_sign() const override { return true; }
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &a = x[1];
    Rows of_g, of_a;
    if (!this->see_both(g, a, 1, of_g, of_a, workspace)) return false;
    int64_t d_in = a.shape[a.ndim - 1], d_out = g.shape[g.ndim - 1];
    Sequences<scalar_t> rows{
        this->data(a),    of_a.batch_stride, of_a.time_stride, this->data(g), of_g.batch_stride,
        of_g.time_stride, workspace.batch,   of_g.time,        d_in,          d_out};
    if (!known_.out_first) {  // of the transposed weight, inputs and gradients change places
      std::swap(rows.a, rows.g);
      std::swap(rows.a_batch, rows.g_batch);
      std::swap(rows.a_time, rows.g_time);
      std::swap(rows.d_in, rows.d_out);
    }
    if (rows.d_out != known_.rows || rows.d_in != known_.columns) return false;
    bool has_bias = this->places_.bias >= 0;
    // The kernel adds up what is on the left: the output gradients, of a weight [d_out, d_in].
    scalar_t* samples = workspace.template scratch<scalar_t>(need(workspace, d_out));
    multiply(rows, has_bias && known_.out_first ? samples : nullptr,
             samples + workspace.batch * d_out, workspace);
    if (!has_bias) return true;
    if (!known_.out_first)
      this->kernels_.sum_over_time(this->data(g), of_g.batch_stride, of_g.time_stride,
                                   workspace.batch, of_g.time, d_out, samples, workspace.threads);
    if (this->gradients().size() > 1)
      this->kernels_.sum_over_time(samples, 0, d_out, 1, workspace.batch, d_out,
                                   workspace.template gradient<scalar_t>(1), workspace.threads);
    this->keep_norms(samples, d_out, this->places_.bias, workspace);
    return true;
  }

 private:
  // Numbers of scratch: the bias' gradient of each sample and, of a large weight, what one of its
  // parts gives.
  int64_t need(const Workspace& workspace, int64_t d_out) const {
    return workspace.batch * (d_out + 1 + known_.rows_at_a_time);
  }

  void multiply(const Sequences<scalar_t>& x, scalar_t* bias, scalar_t* of_part,
                const Workspace& workspace) const {
    scalar_t* gradient = workspace.template gradient<scalar_t>(0);
    scalar_t* norms = workspace.template row<scalar_t>(this->places_.weight);
    int threads = workspace.threads;
    if (!known_.rows_at_a_time)
      return this->kernels_.sequence_fused(x, gradient, norms, bias, nullptr, threads);
    // As `sequence_fused` of ops/native/dense.py.
    scalar_t* part_norms = of_part + x.batch * known_.rows_at_a_time;
    std::vector<double> total(x.batch, 0.0);
    for (int64_t lo = 0; lo < x.d_out; lo += known_.rows_at_a_time) {
      Sequences<scalar_t> part = x;
      part.g += lo;
      part.d_out = std::min(known_.rows_at_a_time, x.d_out - lo);
      this->kernels_.sequence_fused(part, gradient + lo * x.d_in, part_norms,
                                    bias ? of_part : nullptr, nullptr, threads);
      for (int64_t n = 0; n < x.batch; n++) {
        total[n] += part_norms[n];
        if (bias) std::copy_n(of_part + n * part.d_out, part.d_out, bias + n * x.d_out + lo);
      }
    }
    for (int64_t n = 0; n < x.batch; n++) norms[n] = static_cast<scalar_t>(total[n]);
  }

  FusedDense known_;
};

}  // namespace

std::unique_ptr<Step> fused_sequences(int64_t node, const std::string& saved, Places places,
                                      Layout layout, const FusedDense& known,
                                      const std::string& dtype, const std::string& isa) {
  return made<FusedSequences>(dtype, node, saved, places, layout, known, isa);
}

}  // namespace host
}  // namespace fastminima
