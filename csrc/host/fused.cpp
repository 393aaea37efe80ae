#include "host/fused.h"

#include <utility>

#include "host/product.h"

namespace fastminima {
namespace host {
namespace {

template <typename scalar_t>
class FusedSequences : public OverTime<scalar_t> {
 public:
  FusedSequences(int64_t node, const std::string& saved, Places places, Layout layout,
                 const FusedDense& known, const std::string& isa)
      : OverTime<scalar_t>(node, {saved}, places, layout, isa), known_(known) {}

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
    int64_t of_bias = has_bias ? workspace.batch * d_out : 0;
    scalar_t* samples = workspace.template scratch<scalar_t>(
        of_bias + part_size(workspace.batch, known_.rows_at_a_time));
    multiply<scalar_t>(this->kernels_, rows, known_.rows_at_a_time,
                       {workspace.template gradient<scalar_t>(0),
                        workspace.template row<scalar_t>(this->places_.weight),
                        has_bias && known_.out_first ? samples : nullptr, nullptr},
                       samples + of_bias, workspace.threads);
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
