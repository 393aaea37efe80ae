#include "host/leaves.h"

#include "host/kernels.h"

namespace fastminima {
namespace host {
namespace {

template <typename scalar_t>
void keep_square(const dlpack::Tensor& g, const std::string& isa, int threads, void* out,
                 int64_t place) {
  const scalar_t* data = static_cast<const scalar_t*>(g.data);
  int64_t count = elements(g);
  static_cast<scalar_t*>(out)[place] =
      Kernels<scalar_t>::of(isa).multi_sq_norm(&data, &count, 1, threads);
}

}  // namespace

Leaves::Leaves(PyObject* gradients, PyObject* squares, PyObject* arrival, bool by_task,
               const std::string& isa, int threads)
    : gradients_(PyWeakref_NewRef(gradients, nullptr)),
      squares_(Py_NewRef(squares)),
      filter_(arrival, by_task),
      isa_(isa),
      threads_(threads) {
  dlpack::Tensor x;
  if (gradients_ == nullptr || !read(squares, x) || x.ndim != 1 || !is_contiguous(x)) return;
  out_ = x.data;
  bits_ = x.dtype.bits;
  most_ = x.shape[0];
  is_ready_ = is_float_on_cpu(x, 32) || is_float_on_cpu(x, 64);
}

Leaves::~Leaves() {
  Py_XDECREF(gradients_);
  Py_DECREF(squares_);
}

bool Leaves::hook(const std::shared_ptr<Leaves>& leaves, PyObject* nodes,
                  const std::vector<int64_t>& numbers) {
  leaves->states_.assign(numbers.size(), kWaits);
  for (size_t i = 0; i < numbers.size(); i++)
    if (!leaves->hooks_.add(PyList_GET_ITEM(nodes, numbers[i]), leaves, i)) return false;
  return true;
}

int Leaves::close() {
  is_closed_ = true;
  return hooks_.remove();
}

PyObject* Leaves::run(size_t leaf, PyObject* grads) {
  PyObject* grad = PyTuple_GET_SIZE(grads) > 0 ? PyTuple_GET_ITEM(grads, 0) : Py_None;
  if (is_closed_ || grad == Py_None || states_[leaf] == kLeftOut) Py_RETURN_NONE;
  Object held = target_of(gradients_);
  if (!held) Py_RETURN_NONE;
  PyObject* gradients = held.get();
  PassFilter::Answer answer = filter_.ask();
  if (answer == PassFilter::failed) return nullptr;
  // What comes after the pass, which left it out, as of a probe in fused mode, belongs to it.
  if (answer == PassFilter::anothers || (answer == PassFilter::over && states_[leaf] == kTaken))
    Py_RETURN_NONE;
  dlpack::Tensor g;
  bool is_known = answer != PassFilter::unknown && order_.size() < most_ && read(grad, g) &&
                  is_float_on_cpu(g, bits_) && is_contiguous(g);
  if (is_known) {
    states_[leaf] = kTaken;
    if (bits_ == 64)
      keep_square<double>(g, isa_, threads_, out_, order_.size());
    else
      keep_square<float>(g, isa_, threads_, out_, order_.size());
    order_.push_back(static_cast<int64_t>(leaf));
    Py_RETURN_NONE;
  }
  static PyObject* name = PyUnicode_InternFromString("leaf");
  Object number(PyLong_FromSize_t(leaf));
  PyObject* args[] = {gradients, number.get(), grads};
  return PyObject_VectorcallMethod(name, args, 3, nullptr);
}

}  // namespace host
}  // namespace fastminima
