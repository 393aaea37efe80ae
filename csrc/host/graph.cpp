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
  constexpr const char* kSpace = "torch::autograd::";
  if (strncmp(name, kSpace, strlen(kSpace)) == 0) name += strlen(kSpace);
  return strcmp(short_name, name) == 0;
}

// The items of a list that were met, in a table with open addresses: of their places, which take a
// quarter of the memory that pointers do.
class Met {
 public:
  Met(PyObject* list, size_t count) : list_(list) {
    size_t size = 64;
    while (size < 2 * count) size *= 2;
    table_.assign(size, -1);
  }

  // False where what is at this place of the list was met at another.
  bool add(size_t place) {
    PyObject* p = PyList_GET_ITEM(list_, place);
    size_t mask = table_.size() - 1;
    size_t at = ((reinterpret_cast<uintptr_t>(p) >> 4) * 0x9E3779B97F4A7C15u >> 32) & mask;
    while (table_[at] >= 0) {
      if (PyList_GET_ITEM(list_, table_[at]) == p) return false;
      at = (at + 1) & mask;
    }
    table_[at] = static_cast<int32_t>(place);
    return true;
  }

 private:
  PyObject* list_;
  std::vector<int32_t> table_;
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
    PyObject* edges = PyList_GET_ITEM(children, i);
    size_t kind = kind_of(name, reinterpret_cast<PyTypeObject*>(PyList_GET_ITEM(types, i)));
    Node node{kind, false, Py_NewRef(PyList_GET_ITEM(leaves, i)), edges_.size(), 0};
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(edges); k++) {
      PyObject* edge = PyTuple_GET_ITEM(edges, k);
      if (edge == Py_None)
        edges_.push_back({-1, 0});
      else
        edges_.push_back({PyLong_AsLongLong(PyTuple_GET_ITEM(edge, 0)),
                          PyLong_AsLongLong(PyTuple_GET_ITEM(edge, 1))});
    }
    node.last = edges_.size();
    node.is_leaf =
        node.first == node.last && PyUnicode_CompareWithASCIIString(name, kAccumulate) == 0;
    nodes_.push_back(node);
  }
}

Wiring::~Wiring() {
  for (Kind& kind : kinds_) {
    Py_DECREF(kind.name);
    Py_DECREF(kind.type);
  }
  for (Node& node : nodes_) Py_DECREF(node.parameter);
}

size_t Wiring::kind_of(PyObject* name, PyTypeObject* type) {
  for (size_t i = 0; i < kinds_.size(); i++)
    if (kinds_[i].type == type && PyUnicode_Compare(kinds_[i].name, name) == 0) return i;
  Py_INCREF(type);
  kinds_.push_back({Py_NewRef(name), type, is_own_type(type, PyUnicode_AsUTF8(name)),
                    Attribute(host::names().next_functions)});
  return kinds_.size() - 1;
}

int Wiring::is_of(PyObject* node, const Kind& kind) {
  if (Py_TYPE(node) != kind.type) return 0;
  if (kind.is_named_by_type) return 1;
  Object name(PyObject_CallMethodNoArgs(node, names().name));
  return name ? PyUnicode_Compare(name.get(), kind.name) == 0 : -1;
}

int Wiring::is_of_parameter(PyObject* variable, PyObject* parameter, PyObject* parameters) {
  Object id(PyLong_FromVoidPtr(variable));
  if (!id) return -1;
  PyObject* name = PyDict_GetItemWithError(parameters, id.get());  // borrowed
  if (name == nullptr) return PyErr_Occurred() ? -1 : parameter == Py_None;
  if (parameter == Py_None) return 0;
  return PyObject_RichCompareBool(name, parameter, Py_EQ);  // names may be of any type
}

int Wiring::follow(PyObject* root, PyObject* parameters, Found& out) const {
  size_t count = nodes_.size(), found = 1;
  if (count == 0) return 0;
  out.nodes = Object(PyList_New(count));
  if (!out.nodes) return -1;
  out.variables.resize(count);
  PyObject* list = out.nodes.get();
  PyList_SET_ITEM(list, 0, Py_NewRef(root));
  Met met(list, count);
  met.add(0);
  for (size_t i = 0; i < count; i++) {
    if (i >= found) return 0;
    const Node& known = nodes_[i];
    const Kind& kind = kinds_[known.kind];
    PyObject* node = PyList_GET_ITEM(list, i);
    int same = is_of(node, kind);
    if (same != 1) return same;
    if (known.is_leaf) {
      out.variables[i] = Object(variable_.of(node));
      if (!out.variables[i]) return -1;
      same = is_of_parameter(out.variables[i].get(), known.parameter, parameters);
      if (same != 1) return same;
      continue;
    }
    Object below(kind.next_functions.of(node));
    if (!below) return -1;
    if (static_cast<size_t>(PyTuple_GET_SIZE(below.get())) != known.last - known.first) return 0;
    for (size_t k = known.first; k < known.last; k++) {
      PyObject* pair = PyTuple_GET_ITEM(below.get(), k - known.first);
      PyObject* child = PyTuple_GET_ITEM(pair, 0);
      const Edge& edge = edges_[k];
      if ((child == Py_None) != (edge.node < 0)) return 0;
      if (edge.node < 0) continue;
      if (PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 1)) != edge.output) return 0;
      size_t to = static_cast<size_t>(edge.node);
      if (to < found) {
        if (PyList_GET_ITEM(list, to) != child) return 0;
        continue;
      }
      if (to != found) return 0;
      PyList_SET_ITEM(list, found, Py_NewRef(child));
      if (!met.add(found++)) return 0;
    }
  }
  return found == count;
}

Conditions::~Conditions() {
  for (Condition& c : conditions_) Py_DECREF(c.value);
}

void Conditions::add_value(int64_t node, PyObject* attribute, PyObject* value) {
  Py_INCREF(attribute);
  PyUnicode_InternInPlace(&attribute);  // for good
  conditions_.push_back({kValue, node, Py_NewRef(value), Attribute(attribute)});
}

void Conditions::add_shapes(int64_t node, PyObject* shapes) {
  conditions_.push_back(
      {kShapes, node, PySequence_Tuple(shapes), Attribute(names().input_metadata)});
}

void Conditions::add_leaf(int64_t node, PyObject* shape, PyObject* leaf) {
  conditions_.push_back({kLeaf, node, PyTuple_Pack(1, shape), Attribute(names().input_metadata)});
  dlpack::Tensor x;
  if (read(leaf, x)) conditions_.back().dtype = x.dtype;
}

void Conditions::add_type(int64_t node, PyObject* type) {
  conditions_.push_back({kType, node, Py_NewRef(type), Attribute(names().variable)});
}

int Conditions::hold(PyObject* nodes, const std::vector<Object>& variables) const {
  Attribute variable(names().variable);
  for (const Condition& c : conditions_) {
    PyObject* node = PyList_GET_ITEM(nodes, c.node);
    Object read;
    PyObject* seen = nullptr;
    if (c.kind == kLeaf || c.kind == kType) {
      if (!variables.empty()) seen = variables[c.node].get();
      if (seen == nullptr) {
        read = Object(variable.of(node));
        seen = read.get();
      }
      if (seen == nullptr) return -1;
    }
    int held = holds(c, node, seen);
    if (held != 1) return held;
  }
  return 1;
}

int Conditions::holds(const Condition& c, PyObject* node, PyObject* variable) {
  if (c.kind == kValue) {
    Object value(c.attribute.of(node));
    return value ? PyObject_RichCompareBool(value.get(), c.value, Py_EQ) : -1;
  }
  if (c.kind == kType) return reinterpret_cast<PyObject*>(Py_TYPE(variable)) == c.value;
  dlpack::Tensor x;  // most leaves are seen without a Python object of their shape
  if (c.kind == kLeaf && read(variable, x))
    return x.dtype.code == c.dtype.code && x.dtype.bits == c.dtype.bits &&
           has_shape(x, PyTuple_GET_ITEM(c.value, 0));
  Object outputs(c.attribute.of(node));
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
