// Steps whose tensors a kernel on the host reads: what they have in common.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "host/kernels.h"
#include "host/steps.h"

namespace fastminima {
namespace host {

// Strides of a tensor seen as [batch, time, ...]: its leading dims, without `trailing` others.
struct Rows {
  int64_t batch_stride, time_stride, time;
};

// False where no strides say it: dims that do not lie one after the other, another batch size.
inline bool see_rows(const dlpack::Tensor& x, const Layout& layout, int trailing, Rows& out) {
  int leading = x.ndim - trailing;
  if (layout.dim >= leading) return false;
  if (x.shape[layout.dim] != layout.outer * layout.batch * layout.inner) return false;
  int64_t stride = x.strides[layout.dim];
  struct Part {
    int64_t size, stride;
  } parts[16];
  if (leading + 2 > 16) return false;
  int count = 0;
  // The order of `RegularLayout.rows`: dims before, what is left of the own one, dims after.
  for (int i = 0; i < leading; i++) {
    if (i != layout.dim) {
      parts[count++] = {x.shape[i], x.strides[i]};
      continue;
    }
    parts[count++] = {layout.outer, stride * layout.batch * layout.inner};
    parts[count++] = {layout.inner, stride};
  }
  out.batch_stride = stride * layout.inner;
  out.time = 1;
  out.time_stride = 0;
  for (int i = count - 1; i >= 0; i--) {
    if (parts[i].size == 0) return false;
    if (parts[i].size == 1) continue;
    if (out.time == 1)
      out.time_stride = parts[i].stride;
    else if (parts[i].stride != out.time * out.time_stride)
      return false;
    out.time *= parts[i].size;
  }
  return true;
}

// Whether rows [batch, time] lie one after the other, each an element.
inline bool is_list(const Rows& rows, int64_t batch) {
  return (rows.time == 1 || rows.time_stride == 1) &&
         (batch == 1 || rows.batch_stride == rows.time);
}

inline bool has_adjacent_features(const dlpack::Tensor& x) {
  return x.ndim > 0 && x.strides[x.ndim - 1] == 1;
}

inline int64_t width_of(const dlpack::Tensor& x, int trailing) {
  int64_t width = 1;
  for (int i = x.ndim - trailing; i < x.ndim; i++) width *= x.shape[i];
  return width;
}

inline bool is_id(const dlpack::Tensor& x) {
  return x.device.type == dlpack::kCpu && x.dtype.code == dlpack::kInt && x.dtype.bits == 64;
}

// Whether the last dims can be read as one.
inline bool is_flat(const dlpack::Tensor& x, int trailing) {
  int64_t expected = 1;
  for (int i = x.ndim - 1; i >= x.ndim - trailing; i--) {
    if (x.shape[i] != 1 && x.strides[i] != expected) return false;
    expected *= x.shape[i];
  }
  return trailing == 0 || has_adjacent_features(x);
}

template <typename scalar_t>
class Typed : public Step {
 public:
  Typed(int64_t node, const std::vector<std::string>& saved, Places places, const std::string& isa,
        int64_t source = -1)
      : Step(node, saved, source), places_(places), kernels_(Kernels<scalar_t>::of(isa)) {}

 protected:
  static bool is_mine(const dlpack::Tensor& x) { return is_float_on_cpu(x, 8 * sizeof(scalar_t)); }
  static const scalar_t* data(const dlpack::Tensor& x) {
    return static_cast<const scalar_t*>(x.data);
  }

  // Squared norms of gradients [batch, width], to a row of the table.
  void keep_norms(const scalar_t* gradients, int64_t width, int64_t place,
                  const Workspace& workspace) const {
    if (place >= 0)
      kernels_.sample_sq_norms(gradients, workspace.batch, width,
                               workspace.template row<scalar_t>(place), workspace.threads);
  }

  Places places_;
  Kernels<scalar_t> kernels_;
};

template <typename scalar_t>
class OverTime : public Typed<scalar_t> {
 public:
  OverTime(int64_t node, const std::vector<std::string>& saved, Places places, Layout layout,
           const std::string& isa, int64_t source = -1)
      : Typed<scalar_t>(node, saved, places, isa, source), layout_(layout) {}

 protected:
  // Sees two tensors as rows of the same samples and times, whose features lie together.
  bool see_both(const dlpack::Tensor& g, const dlpack::Tensor& x, int trailing, Rows& of_g,
                Rows& of_x, const Workspace& workspace) const {
    return this->is_mine(g) && this->is_mine(x) && layout_.batch == workspace.batch &&
           g.ndim >= trailing && x.ndim >= trailing && is_flat(g, trailing) &&
           is_flat(x, trailing) && see_rows(g, layout_, trailing, of_g) &&
           see_rows(x, layout_, trailing, of_x) && of_g.time == of_x.time;
  }

  Layout layout_;
};

template <template <typename> class Kind, typename... Args>
std::unique_ptr<Step> made(const std::string& dtype, const Args&... args) {
  if (dtype == "f64") return std::make_unique<Kind<double>>(args...);
  return std::make_unique<Kind<float>>(args...);
}

}  // namespace host
}  // namespace fastminima
