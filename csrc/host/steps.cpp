#include "host/steps.h"

#include <algorithm>
#include <stdexcept>

#include "host/names.h"
#include "host/typed.h"

namespace fastminima {
namespace host {
namespace {

PyObject* interned(const std::string& text) { return PyUnicode_InternFromString(text.c_str()); }

template <typename scalar_t>
class SingleRows : public Typed<scalar_t> {
 public:
  using Typed<scalar_t>::Typed;

 public:
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &a = x[1];
    if (!this->is_mine(g) || !this->is_mine(a) || g.ndim != 2 || a.ndim != 2) return false;
    if (g.shape[0] != workspace.batch || a.shape[0] != workspace.batch) return false;
    if (!has_adjacent_features(g) || !has_adjacent_features(a)) return false;
    scalar_t* weight = workspace.template row<scalar_t>(this->places_.weight);
    scalar_t* bias = workspace.template row<scalar_t>(this->places_.bias);
    if (bias == nullptr) bias = workspace.template scratch<scalar_t>(workspace.batch);
    this->kernels_.row_sq_norms(this->data(a), a.strides[0], this->data(g), g.strides[0],
                                workspace.batch, a.shape[1], g.shape[1], weight, bias,
                                workspace.threads);
    return true;
  }
};

template <typename scalar_t>
class SequencesOf : public OverTime<scalar_t> {
 public:
  SequencesOf(int64_t node, const std::string& saved, Places places, Layout layout, double guard,
              const std::string& isa)
      : OverTime<scalar_t>(node, {saved}, places, layout, isa), guard_(guard) {}

 public:
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &a = x[1];
    Rows of_g, of_a;
    if (!this->see_both(g, a, 1, of_g, of_a, workspace)) return false;
    Sequences<scalar_t> rows{this->data(a),      of_a.batch_stride, of_a.time_stride,
                             this->data(g),      of_g.batch_stride, of_g.time_stride,
                             workspace.batch,    of_g.time,         a.shape[a.ndim - 1],
                             g.shape[g.ndim - 1]};
    this->kernels_.sequence_sq_norms(
        rows, guard_, workspace.template row<scalar_t>(this->places_.weight),
        workspace.template row<scalar_t>(this->places_.bias), workspace.threads);
    return true;
  }

 private:
  double guard_;
};

template <typename scalar_t>
class LayerNorm : public OverTime<scalar_t> {
 public:
  LayerNorm(int64_t node, const std::vector<std::string>& saved, Places places, Layout layout,
            int trailing, const std::string& isa)
      : OverTime<scalar_t>(node, saved, places, layout, isa), trailing_(trailing) {}

 public:
  bool minds_sign() const override { return true; }  // the mean is taken from the input
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &input = x[1], &mean = x[2], &rstd = x[3];
    Rows of_g, of_x, of_mean, of_rstd;
    if (!this->see_both(g, input, trailing_, of_g, of_x, workspace)) return false;
    if (!this->see_both(mean, rstd, trailing_, of_mean, of_rstd, workspace)) return false;
    int64_t batch = workspace.batch, width = width_of(g, trailing_);
    if (of_mean.time != of_g.time || !is_list(of_mean, batch) || !is_list(of_rstd, batch))
      return false;
    if (width_of(input, trailing_) != width || width_of(mean, trailing_) != 1 ||
        width_of(rstd, trailing_) != 1)
      return false;
    scalar_t* weight = workspace.template scratch<scalar_t>(2 * batch * width);
    scalar_t* bias = weight + batch * width;
    this->kernels_.layer_norm_gradients(this->data(g), of_g.batch_stride, of_g.time_stride,
                                        this->data(input), of_x.batch_stride, of_x.time_stride,
                                        this->data(mean), this->data(rstd), batch, of_g.time, width,
                                        weight, bias, workspace.threads);
    this->keep_norms(weight, width, this->places_.weight, workspace);
    this->keep_norms(bias, width, this->places_.bias, workspace);
    return true;
  }

 private:
  int trailing_;
};

template <typename scalar_t>
class Scale : public OverTime<scalar_t> {
 public:
  Scale(int64_t node, const std::string& saved, Places places, Layout layout,
        const std::string& isa)
      : OverTime<scalar_t>(node, {saved}, places, layout, isa) {}

 public:
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &other = x[1];
    Rows of_g, of_other;
    if (!this->see_both(g, other, 1, of_g, of_other, workspace)) return false;
    int64_t width = width_of(g, 1);
    if (width_of(other, 1) != width) return false;
    scalar_t* gradients = workspace.template scratch<scalar_t>(workspace.batch * width);
    this->kernels_.product_over_time(this->data(g), of_g.batch_stride, of_g.time_stride,
                                     this->data(other), of_other.batch_stride, of_other.time_stride,
                                     workspace.batch, of_g.time, width, gradients,
                                     workspace.threads);
    this->keep_norms(gradients, width, this->places_.weight, workspace);
    return true;
  }
};

template <typename scalar_t>
class Sum : public OverTime<scalar_t> {
 public:
  Sum(int64_t node, Places places, Layout layout, const std::string& isa)
      : OverTime<scalar_t>(node, {}, places, layout, isa) {}

 public:
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor& g = x[0];
    Rows of_g;
    if (!this->see_both(g, g, 1, of_g, of_g, workspace)) return false;
    int64_t width = width_of(g, 1);
    scalar_t* gradients = workspace.template scratch<scalar_t>(workspace.batch * width);
    this->kernels_.sum_over_time(this->data(g), of_g.batch_stride, of_g.time_stride,
                                 workspace.batch, of_g.time, width, gradients, workspace.threads);
    this->keep_norms(gradients, width, this->places_.weight, workspace);
    return true;
  }
};

template <typename scalar_t>
class Table : public OverTime<scalar_t> {
 public:
  Table(int64_t node, const std::string& saved, Places places, Layout layout, int64_t padding,
        const std::string& isa)
      : OverTime<scalar_t>(node, {saved}, places, layout, isa), padding_(padding) {}

 public:
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &ids = x[1];
    Rows of_g, of_ids;
    int64_t batch = workspace.batch;
    if (!this->is_mine(g) || this->layout_.batch != batch || g.ndim != ids.ndim + 1) return false;
    if (!is_id(ids)) return false;
    if (!has_adjacent_features(g) || !see_rows(g, this->layout_, 1, of_g) ||
        !see_rows(ids, this->layout_, 0, of_ids))
      return false;
    if (of_g.time != of_ids.time || !is_list(of_ids, batch)) return false;
    this->kernels_.embedding_sq_norms(
        static_cast<const int64_t*>(ids.data), this->data(g), of_g.batch_stride, of_g.time_stride,
        padding_, batch, of_g.time, g.shape[g.ndim - 1],
        workspace.template row<scalar_t>(this->places_.weight), workspace.threads);
    return true;
  }

 private:
  int64_t padding_;
};

template <typename scalar_t>
class SharedTable : public OverTime<scalar_t> {
 public:
  SharedTable(int64_t node, int64_t source, const std::string& saved, Places places, Layout layout,
              int64_t padding, const std::string& isa)
      : OverTime<scalar_t>(node, {saved}, places, layout, isa, source), padding_(padding) {}

 public:
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override {
    const dlpack::Tensor &g = x[0], &ids = x[1];
    Rows of_g;
    int64_t batch = workspace.batch, time = elements(ids);
    if (!this->is_mine(g) || this->layout_.batch != batch || !is_list_of_ids(ids)) return false;
    if (!has_adjacent_features(g) || !see_rows(g, this->layout_, 1, of_g) || of_g.time != time)
      return false;
    int64_t* of_all = workspace.template scratch<int64_t>(batch * time);
    for (int64_t n = 0; n < batch; n++)
      std::copy_n(static_cast<const int64_t*>(ids.data), time, of_all + n * time);
    this->kernels_.embedding_sq_norms(of_all, this->data(g), of_g.batch_stride, of_g.time_stride,
                                      padding_, batch, time, g.shape[g.ndim - 1],
                                      workspace.template row<scalar_t>(this->places_.weight),
                                      workspace.threads);
    return true;
  }

 private:
  static bool is_list_of_ids(const dlpack::Tensor& ids) { return is_id(ids) && is_contiguous(ids); }
  int64_t padding_;
};

}  // namespace

Step::Step(int64_t node, const std::vector<std::string>& saved, int64_t source)
    : node_(node),
      source_(source < 0 ? node : source),
      raw_(interned(saved.empty() ? "" : "_raw" + saved[0])) {
  if (saved.size() >= kMost) throw std::invalid_argument("a step reads three tensors at most");
  for (const std::string& name : saved) saved_.emplace_back(interned(name));
}

Step::~Step() {
  for (Required& r : required_) Py_DECREF(r.value);
  for (Gradient& g : gradients_)
    for (PyObject* held : {g.shape, g.made, g.kept}) Py_DECREF(held);
}

void Step::make(int64_t row, PyObject* shape, PyObject* made, PyObject* kept) {
  if (gradients_.size() == kMostGradients)
    throw std::invalid_argument("a step makes two gradients at most");
  gradients_.push_back({row, Py_NewRef(shape), Py_NewRef(made), Py_NewRef(kept)});
}

void Step::require_of(int64_t node, PyObject* attribute, PyObject* value) {
  Py_INCREF(attribute);
  PyUnicode_InternInPlace(&attribute);  // for good
  required_.push_back({node, Attribute(attribute), Py_NewRef(value)});
}

int Step::fits(PyObject* nodes) const {
  for (const Required& r : required_) {
    Object value(r.attribute.of(PyList_GET_ITEM(nodes, r.node)));
    if (!value) return -1;
    int same = PyObject_RichCompareBool(value.get(), r.value, Py_EQ);
    if (same != 1) return same;
  }
  return 1;
}

int Step::read_saved(PyObject* node, Object* saved) const {
  // What a hook gives out, as a checkpoint does, it may give once. A node saves all it keeps at
  // one time, under the same hooks or none: the first tells for all.
  Object raw(raw_.of(node));
  if (!raw) return -1;
  Object hook(PyObject_GetAttr(raw.get(), names().unpack_hook));
  if (!hook) return -1;
  if (hook.get() != Py_None) return 0;
  for (size_t i = 0; i < saved_.size(); i++) {
    saved[i] = Object(saved_[i].of(node));
    if (!saved[i]) return -1;
  }
  return 1;
}

std::unique_ptr<Step> single_rows(int64_t node, const std::string& saved, Places places,
                                  const std::string& dtype, const std::string& isa) {
  return made<SingleRows>(dtype, node, std::vector<std::string>{saved}, places, isa);
}

std::unique_ptr<Step> sequences(int64_t node, const std::string& saved, Places places,
                                Layout layout, double guard, const std::string& dtype,
                                const std::string& isa) {
  return made<SequencesOf>(dtype, node, saved, places, layout, guard, isa);
}

std::unique_ptr<Step> layer_norm(int64_t node, const std::vector<std::string>& saved, Places places,
                                 Layout layout, int trailing, const std::string& dtype,
                                 const std::string& isa) {
  return made<LayerNorm>(dtype, node, saved, places, layout, trailing, isa);
}

std::unique_ptr<Step> scale(int64_t node, const std::string& saved, Places places, Layout layout,
                            const std::string& dtype, const std::string& isa) {
  return made<Scale>(dtype, node, saved, places, layout, isa);
}

std::unique_ptr<Step> sum(int64_t node, Places places, Layout layout, const std::string& dtype,
                          const std::string& isa) {
  return made<Sum>(dtype, node, places, layout, isa);
}

std::unique_ptr<Step> table(int64_t node, const std::string& saved, Places places, Layout layout,
                            int64_t padding, const std::string& dtype, const std::string& isa) {
  return made<Table>(dtype, node, saved, places, layout, padding, isa);
}

std::unique_ptr<Step> shared_table(int64_t node, int64_t source, const std::string& saved,
                                   Places places, Layout layout, int64_t padding,
                                   const std::string& dtype, const std::string& isa) {
  return made<SharedTable>(dtype, node, source, saved, places, layout, padding, isa);
}

}  // namespace host
}  // namespace fastminima
