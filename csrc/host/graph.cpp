#include "host/graph.h"

#include <algorithm>
#include <cstring>

#include "host/names.h"

namespace fastminima {
namespace host {
namespace {

constexpr const char* kAccumulate = "torch::autograd::AccumulateGrad";

// Whether the type of a node has the node's own name, and so is shared with no other kind.
bool is_own_type(PyTypeObject* type, const char* name) {
  const char* short_name = strrchr(type->tp_name, '.');
  short_name = short_name ? short_name + 1 : type->tp_name;
  return strcmp(short_name, name) == 0;
}

// Pointers that were met, in a table with open addresses.
class Met {
 public:
  explicit Met(size_t count) {
    size_t size = 64;
    while (size < 4 * count) size *= 2;
    table_.assign(size, nullptr);
  }

  // False where it was met before.
  bool add(PyObject* p) {
    size_t mask = table_.size() - 1;
    size_t at = (reinterpret_cast<uintptr_t>(p) >> 4) * 0x9E3779B97F4A7C15u & mask;
    while (table_[at] != nullptr) {
      if (table_[at] == p) return false;
      at = (at + 1) & mask;
    }
    table_[at] = p;
    return true;
  }

 private:
  std::vector<PyObject*> table_;
};

// Whether two sequences, of whatever kind, have the same items; -1 with a Python error set.
int have_same_items(PyObject* left, PyObject* right) {
  Object a(PySequence_Fast(left, "a shape")), b(PySequence_Fast(right, "a shape"));
  if (!a || !b) return -1;
  Py_ssize_t count = PySequence_Fast_GET_SIZE(a.get());
  if (count != PySequence_Fast_GET_SIZE(b.get())) return 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    int same = PyObject_RichCompareBool(PySequence_Fast_GET_ITEM(a.get(), i),
                                        PySequence_Fast_GET_ITEM(b.get(), i), Py_EQ);
    if (same != 1) return same;
  }
  return 1;
}

// Whether a tensor's shape is a tuple's.
bool has_shape(const dlpack::Tensor& x, PyObject* shape) {
  if (x.ndim != PyTuple_GET_SIZE(shape)) return false;
  for (int i = 0; i < x.ndim; i++)
    if (x.shape[i] != PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i))) return false;
  return true;
}

}  // namespace

Wiring::Wiring(PyObject* names, PyObject* types, PyObject* children, PyObject* leaves) {
  Py_ssize_t count = PyList_GET_SIZE(names);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject* name = PyList_GET_ITEM(names, i);
    auto* type = reinterpret_cast<PyTypeObject*>(PyList_GET_ITEM(types, i));
    PyObject* edges = PyList_GET_ITEM(children, i);
    Node node{Py_NewRef(name), type, false, false, Py_NewRef(PyList_GET_ITEM(leaves, i)),
              edges_.size(),   0};
    Py_INCREF(type);
    const char* text = PyUnicode_AsUTF8(name);
    node.is_named_by_type = is_own_type(type, text);
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(edges); k++) {
      PyObject* edge = PyTuple_GET_ITEM(edges, k);
      if (edge == Py_None)
        edges_.push_back({-1, 0});
      else
        edges_.push_back({PyLong_AsLongLong(PyTuple_GET_ITEM(edge, 0)),
                          PyLong_AsLongLong(PyTuple_GET_ITEM(edge, 1))});
    }
    node.last = edges_.size();
    node.is_leaf = node.first == node.last && strcmp(text, kAccumulate) == 0;
    nodes_.push_back(node);
  }
}

Wiring::~Wiring() {
  for (Node& node : nodes_) {
    Py_DECREF(node.name);
    Py_DECREF(node.type);
    Py_DECREF(node.parameter);
  }
}

bool Wiring::is_same(PyObject* node, const Node& known, PyObject* parameters, int& failed) const {
  if (Py_TYPE(node) != known.type) return false;
  if (!known.is_named_by_type) {
    Object name(PyObject_CallMethodNoArgs(node, names().name));
    if (!name) return failed = 1, false;
    if (PyUnicode_Compare(name.get(), known.name) != 0) return false;
  }
  if (!known.is_leaf) return true;
  Object variable(PyObject_GetAttr(node, names().variable));
  if (!variable) return failed = 1, false;
  Object id(PyLong_FromVoidPtr(variable.get()));
  PyObject* name = PyDict_GetItemWithError(parameters, id.get());  // borrowed
  if (name == nullptr) {
    if (PyErr_Occurred()) return failed = 1, false;
    return known.parameter == Py_None;
  }
  if (known.parameter == Py_None) return false;
  int same = PyObject_RichCompareBool(name, known.parameter, Py_EQ);  // names may be of any type
  if (same < 0) failed = 1;
  return same == 1;
}

PyObject* Wiring::follow(PyObject* root, PyObject* parameters) const {
  size_t count = nodes_.size(), found = 1;
  if (count == 0) Py_RETURN_NONE;
  Object list(PyList_New(count));
  if (!list) return nullptr;
  PyList_SET_ITEM(list.get(), 0, Py_NewRef(root));
  Met met(count);
  met.add(root);
  for (size_t i = 0; i < count; i++) {
    if (i >= found) Py_RETURN_NONE;
    const Node& known = nodes_[i];
    PyObject* node = PyList_GET_ITEM(list.get(), i);
    int failed = 0;
    if (!is_same(node, known, parameters, failed)) {
      if (failed) return nullptr;
      Py_RETURN_NONE;
    }
    if (known.is_leaf) continue;
    Object below(PyObject_GetAttr(node, names().next_functions));
    if (!below) return nullptr;
    if (static_cast<size_t>(PyTuple_GET_SIZE(below.get())) != known.last - known.first)
      Py_RETURN_NONE;
    for (size_t k = known.first; k < known.last; k++) {
      PyObject* pair = PyTuple_GET_ITEM(below.get(), k - known.first);
      PyObject* child = PyTuple_GET_ITEM(pair, 0);
      const Edge& edge = edges_[k];
      if ((child == Py_None) != (edge.node < 0)) Py_RETURN_NONE;
      if (edge.node < 0) continue;
      if (PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 1)) != edge.output) Py_RETURN_NONE;
      size_t to = static_cast<size_t>(edge.node);
      if (to < found) {
        if (PyList_GET_ITEM(list.get(), to) != child) Py_RETURN_NONE;
        continue;
      }
      if (to != found || !met.add(child)) Py_RETURN_NONE;
      PyList_SET_ITEM(list.get(), found++, Py_NewRef(child));
    }
  }
  if (found != count) Py_RETURN_NONE;
  return Py_NewRef(list.get());
}

Conditions::~Conditions() {
  for (Condition& c : conditions_) {
    Py_XDECREF(c.attribute);
    Py_DECREF(c.value);
  }
}

void Conditions::add_value(int64_t node, PyObject* attribute, PyObject* value) {
  Py_INCREF(attribute);
  PyUnicode_InternInPlace(&attribute);
  conditions_.push_back({kValue, node, attribute, Py_NewRef(value)});
}

void Conditions::add_shapes(int64_t node, PyObject* shapes) {
  conditions_.push_back({kShapes, node, nullptr, PySequence_Tuple(shapes)});
}

void Conditions::add_leaf(int64_t node, PyObject* shape, PyObject* leaf) {
  conditions_.push_back({kLeaf, node, nullptr, PyTuple_Pack(1, shape)});
  dlpack::Tensor x;
  if (read(leaf, x)) conditions_.back().dtype = x.dtype;
}

void Conditions::add_type(int64_t node, PyObject* type) {
  conditions_.push_back({kType, node, nullptr, Py_NewRef(type)});
}

int Conditions::hold(PyObject* nodes) const {
  for (const Condition& c : conditions_) {
    int held = holds(c, PyList_GET_ITEM(nodes, c.node));
    if (held != 1) return held;
  }
  return 1;
}

int Conditions::holds(const Condition& c, PyObject* node) {
  if (c.kind == kValue) {
    Object value(PyObject_GetAttr(node, c.attribute));
    return value ? PyObject_RichCompareBool(value.get(), c.value, Py_EQ) : -1;
  }
  if (c.kind == kLeaf || c.kind == kType) {
    Object variable(PyObject_GetAttr(node, names().variable));
    if (!variable) return -1;
    if (c.kind == kType) return reinterpret_cast<PyObject*>(Py_TYPE(variable.get())) == c.value;
    dlpack::Tensor x;  // most are seen without a Python object of their shape
    if (read(variable.get(), x))
      return x.dtype.code == c.dtype.code && x.dtype.bits == c.dtype.bits &&
             has_shape(x, PyTuple_GET_ITEM(c.value, 0));
  }
  Object outputs(PyObject_GetAttr(node, names().input_metadata));
  if (!outputs) return -1;
  Object each(PySequence_Fast(outputs.get(), "a node's outputs"));
  if (!each) return -1;
  if (PySequence_Fast_GET_SIZE(each.get()) != PyTuple_GET_SIZE(c.value)) return 0;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(c.value); k++) {
    Object shape(PyObject_GetAttr(PySequence_Fast_GET_ITEM(each.get(), k), names().shape));
    if (!shape) return -1;
    int same = have_same_items(shape.get(), PyTuple_GET_ITEM(c.value, k));
    if (same != 1) return same;
  }
  return 1;
}

}  // namespace host
}  // namespace fastminima
