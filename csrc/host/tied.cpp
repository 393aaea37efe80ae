// A table that is also the weight of a head.
#include <algorithm>

#include "host/product.h"

namespace fastminima {
namespace host {
namespace {

class Half : public Step {
 public:
  Half(int64_t node, const std::string& saved, int64_t partner)
      : Step(node, {saved}), partner_(partner) {}
  int64_t partner() const override { return partner_; }
  bool compute(const dlpack::Tensor*, const Workspace&) const override { return false; }

 private:
  int64_t partner_;
};

// |h|^2 + |e|^2 + 2 <h, e>, of a head's gradients h and a table's e: `contributions/joined.py`.
template <typename scalar_t>
class TiedHalf : public Typed<scalar_t> {
 public:
  TiedHalf(int64_t node, const std::string& saved, int64_t partner, Places places,
           const Tied& known, const std::string& isa)
      : Typed<scalar_t>(node, {saved}, places, isa), partner_(partner), known_(known) {}
  int64_t partner() const override { return partner_; }

  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor* of_head = x + (known_.is_head_first ? 0 : 2);
    const dlpack::Tensor* of_table = x + (known_.is_head_first ? 2 : 0);
    const dlpack::Tensor &go = of_head[0], &a = of_head[1], &ge = of_table[0], &ids = of_table[1];
    Rows of_go, of_a, of_ge, of_ids;
    int64_t batch = workspace.batch;
    if (!this->is_mine(go) || !this->is_mine(a) || !this->is_mine(ge) || !is_id(ids)) return false;
    if (known_.head.batch != batch || known_.table.batch != batch) return false;
    if (go.ndim != 2 || a.ndim != 2 || ge.ndim != ids.ndim + 1) return false;
    if (!has_adjacent_features(go) || !has_adjacent_features(a) || !has_adjacent_features(ge))
      return false;
    if (!see_rows(go, known_.head, 1, of_go) || !see_rows(a, known_.head, 1, of_a) ||
        !see_rows(ge, known_.table, 1, of_ge) || !see_rows(ids, known_.table, 0, of_ids))
      return false;
    int64_t width = ge.shape[ge.ndim - 1];
    if (of_go.time != of_a.time || of_ge.time != of_ids.time || !is_list(of_ids, batch))
      return false;
    if (a.shape[1] != width) return false;
    Sequences<scalar_t> head{this->data(a),  of_a.batch_stride,  of_a.time_stride,
                             this->data(go), of_go.batch_stride, of_go.time_stride,
                             batch,          of_go.time,         width,
                             go.shape[1]};
    const int64_t* rows = static_cast<const int64_t*>(ids.data);
    int threads = workspace.threads;
    scalar_t* of_both =
        workspace.template scratch<scalar_t>(3 * batch + part_size(batch, known_.rows_at_a_time));
    scalar_t *h = of_both, *e = h + batch, *cross = e + batch, *of_part = cross + batch;
    bool is_fused = !this->gradients().empty();
    scalar_t* gradient = workspace.template gradient<scalar_t>(0);
    if (is_fused && !are_within(ids, go.shape[1])) return false;
    if (is_fused)
      multiply<scalar_t>(this->kernels_, head, known_.rows_at_a_time,
                         {gradient, h, nullptr, nullptr}, of_part, threads);
    else
      this->kernels_.sequence_sq_norms(head, known_.guard, h, nullptr, threads);
    this->kernels_.tied_cross(head, rows, this->data(ge), of_ge.batch_stride, of_ge.time_stride,
                              known_.padding, of_ge.time, cross, threads);
    this->kernels_.embedding_sq_norms(rows, this->data(ge), of_ge.batch_stride, of_ge.time_stride,
                                      known_.padding, batch, of_ge.time, width, e, threads);
    scalar_t* norms = workspace.template row<scalar_t>(this->places_.weight);
    for (int64_t n = 0; n < batch; n++) {
      scalar_t parts = e[n] + h[n], total = parts + 2 * cross[n];
      if (!(total >= scalar_t(1e-2) * parts)) return false;  // they cancel: made from gradients
      norms[n] = total;
    }
    for (int64_t i = 0; is_fused && i < elements(ids); i++)
      if (rows[i] != known_.padding) {
        const scalar_t* from = this->data(ge) + i / of_ge.time * of_ge.batch_stride +
                               i % of_ge.time * of_ge.time_stride;
        for (int64_t k = 0; k < width; k++) gradient[rows[i] * width + k] += from[k];
      }
    return true;
  }

 private:
  // Whether all ids are rows of the table: what was saved may have been written into since.
  bool are_within(const dlpack::Tensor& ids, int64_t count) const {
    const int64_t* rows = static_cast<const int64_t*>(ids.data);
    return std::all_of(rows, rows + elements(ids), [&](int64_t row) {
      return (row >= 0 && row < count) || row == known_.padding;
    });
  }

  int64_t partner_;
  Tied known_;
};

}  // namespace

std::unique_ptr<Step> half(int64_t node, const std::string& saved, int64_t partner) {
  return std::make_unique<Half>(node, saved, partner);
}

std::unique_ptr<Step> tied(int64_t node, const std::string& saved, int64_t partner, Places places,
                           const Tied& known, const std::string& dtype, const std::string& isa) {
  return made<TiedHalf>(dtype, node, saved, partner, places, known, isa);
}

}  // namespace host
}  // namespace fastminima
