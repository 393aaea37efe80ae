// What Python makes programs with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/attribute.h"
#include "host/called.h"
#include "host/fused.h"
#include "host/graph.h"
#include "host/kernels.h"
#include "host/leaves.h"
#include "host/names.h"
#include "host/program.h"

namespace fastminima {

namespace py = pybind11;

namespace host {
namespace {

py::object stolen(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

Layout layout_of(const std::tuple<int, int64_t, int64_t, int64_t>& x) {
  return {std::get<0>(x), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

dlpack::Tensor read_or_throw(py::handle tensor) {
  dlpack::Tensor x;
  if (!read(tensor.ptr(), x)) throw std::invalid_argument("not a dense tensor with memory");
  return x;
}

// The steps of one recipe, while they are added.
class Program {
 public:
  Program(std::string dtype, std::string isa)
      : dtype_(std::move(dtype)), isa_(std::move(isa)), steps_(std::make_shared<Steps>()) {}

  // Of the gradients that it makes: rows of the table, shapes, and dtypes as Step has them.
  using Gradients = std::vector<std::tuple<int64_t, py::tuple, py::object, py::object>>;
  void add(std::unique_ptr<Step> step, const py::dict& required, const Gradients& gradients = {}) {
    for (const auto& [row, shape, made, kept] : gradients)
      step->make(row, shape.ptr(), made.ptr(), kept.ptr());
    for (auto item : required) step->require(item.first.ptr(), item.second.ptr());
    steps_->push_back(std::move(step));
  }
  // Lets launches take the place of a step that Python takes.
  void launch(int64_t node, std::shared_ptr<const Launches> launches) {
    for (const auto& step : *steps_)
      if (auto* called = dynamic_cast<Called*>(step.get()); called && called->node() == node)
        return called->add(std::move(launches));
    throw std::invalid_argument("Python takes no step at node " + std::to_string(node));
  }
  size_t size() const { return steps_->size(); }
  const std::string& dtype() const { return dtype_; }
  const std::string& isa() const { return isa_; }
  std::shared_ptr<const Steps> steps() const { return steps_; }

 private:
  std::string dtype_, isa_;
  std::shared_ptr<Steps> steps_;
};

// Those of Python: function, grid, threads, bytes of shared memory, arguments, and which of them
// point where: (argument, kind, number, offset).
using Described =
    std::tuple<uintptr_t, std::array<unsigned, 3>, unsigned, unsigned, std::vector<uint64_t>,
               std::vector<std::tuple<size_t, int, int64_t, int64_t>>>;

std::shared_ptr<Launches> launches_of(const py::list& inputs,
                                      const std::vector<Described>& described,
                                      std::vector<int64_t> places, int64_t bytes,
                                      const py::object& kept) {
  std::vector<Likeness> likenesses;
  for (py::handle input : inputs) likenesses.emplace_back(read_or_throw(input));
  std::vector<Launch> launches;
  for (const auto& [function, grid, threads, shared, arguments, pointers] : described) {
    Launch launch{reinterpret_cast<void*>(function),
                  {grid[0], grid[1], grid[2]},
                  threads,
                  shared,
                  arguments,
                  {}};
    for (const auto& [argument, kind, number, offset] : pointers)
      launch.pointers.push_back({argument, {Pointer::Where(kind), number, offset}});
    launches.push_back(std::move(launch));
  }
  return std::make_shared<Launches>(std::move(likenesses), std::move(launches), std::move(places),
                                    bytes, kept.ptr());
}

// Launches them once for these tensors; false where they do not fit.
bool run_launches(const Launches& launches, const py::list& inputs, const py::list& outputs,
                  const py::object& scratch) {
  std::vector<dlpack::Tensor> x;
  std::vector<void*> to;
  for (py::handle input : inputs) x.push_back(read_or_throw(input));
  for (py::handle output : outputs) to.push_back(read_or_throw(output).data);
  dlpack::Tensor memory = read_or_throw(scratch);
  DeviceMemory device;
  device.device = memory.device;
  device.scratch = static_cast<char*>(memory.data);
  device.bytes = elements(memory) * memory.dtype.bits / 8;
  return x.size() == launches.inputs() && to.size() == launches.places().size() &&
         current_stream(memory.device, device.stream) && launches.run(x.data(), to.data(), device);
}

// What one step finds of the gradient and what was saved, into rows [parameters, batch], and the
// gradients that it makes; false where these are not what it was made for.
bool compute_step(const Program& program, size_t number, const py::list& tensors,
                  const py::object& rows, const py::list& gradients, int threads) {
  const Step& step = *program.steps()->at(number);
  dlpack::Tensor x[Step::kMost], to, made;
  if (tensors.size() != step.saved() + 1 || gradients.size() != step.gradients().size() ||
      !read(rows.ptr(), to))
    return false;
  for (size_t i = 0; i < tensors.size(); i++)
    if (!read(py::handle(tensors[i]).ptr(), x[i])) return false;
  const int bits = program.dtype() == "f64" ? 64 : 32;
  if (to.ndim != 2 || !is_float_on_cpu(to, bits)) return false;
  std::vector<char> memory;
  Workspace workspace;
  for (size_t i = 0; i < gradients.size(); i++) {
    if (!read(py::handle(gradients[i]).ptr(), made) || !is_float_on_cpu(made, bits) ||
        !is_contiguous(made))
      return false;
    workspace.gradients[i] = made.data;
  }
  workspace.table = to.data;
  workspace.batch = to.shape[1];
  workspace.stride = to.strides[0];
  workspace.threads = threads;
  workspace.memory = &memory;
  py::gil_scoped_release meanwhile;
  return step.compute(x, workspace);
}

// The gradients of some parameters, those that have one.
template <typename scalar_t>
struct Gradients {
  std::vector<const scalar_t*> data;
  std::vector<int64_t> sizes, places;  // places among the parameters
  std::vector<Object> held;

  // False where one is not a dense tensor of this dtype in the host's memory.
  bool read_from(const py::list& parameters) {
    Attribute grads(names().grad, Attribute::kOfOneCall);
    int64_t place = -1;
    for (py::handle parameter : parameters) {
      place++;
      Object grad(grads.of(parameter.ptr()));
      if (!grad) throw py::error_already_set();
      if (grad.get() == Py_None) continue;
      dlpack::Tensor g;
      if (!read(grad.get(), g) || !is_float_on_cpu(g, 8 * sizeof(scalar_t)) || !is_contiguous(g))
        return false;
      data.push_back(static_cast<const scalar_t*>(g.data));
      sizes.push_back(elements(g));
      places.push_back(place);
      held.push_back(std::move(grad));
    }
    return !data.empty();
  }
};

// |g|^2 over the gradients of some parameters, all together, into a tensor of one number; false
// where that is not for these.
template <typename scalar_t>
bool sum_of_squares(const py::list& parameters, const std::string& isa, int threads,
                    const py::object& out) {
  dlpack::Tensor to;
  Gradients<scalar_t> of;
  if (!read(out.ptr(), to) || !is_float_on_cpu(to, 8 * sizeof(scalar_t)) || elements(to) != 1 ||
      !of.read_from(parameters))
    return false;
  *static_cast<scalar_t*>(to.data) = Kernels<scalar_t>::of(isa).multi_sq_norm(
      of.data.data(), of.sizes.data(), of.data.size(), threads);
  return true;
}

// |g|^2 of each gradient, one after the other into a dense tensor of as many numbers as there are
// parameters, and the places of those that have one; None where that is not for these.
template <typename scalar_t>
py::object each_square(const py::list& parameters, const std::string& isa, int threads,
                       const py::object& out) {
  dlpack::Tensor to;
  Gradients<scalar_t> of;
  if (!read(out.ptr(), to) || !is_float_on_cpu(to, 8 * sizeof(scalar_t)) ||
      elements(to) != static_cast<int64_t>(parameters.size()) || !is_contiguous(to) ||
      !of.read_from(parameters))
    return py::none();
  for (size_t i = 0; i < of.data.size(); i++)
    static_cast<scalar_t*>(to.data)[i] =
        Kernels<scalar_t>::of(isa).multi_sq_norm(&of.data[i], &of.sizes[i], 1, threads);
  return py::cast(of.places);
}

// The sum of a dense vector, or of one number, in the host's memory; None where it is another.
py::object total_of(const py::object& tensor) {
  dlpack::Tensor x;
  if (!read(tensor.ptr(), x) || x.ndim > 1) return py::none();
  int64_t count = elements(x), stride = x.ndim ? x.strides[0] : 1;
  double total = 0;
  if (is_float_on_cpu(x, 32))
    for (int64_t i = 0; i < count; i++) total += static_cast<const float*>(x.data)[i * stride];
  else if (is_float_on_cpu(x, 64))
    for (int64_t i = 0; i < count; i++) total += static_cast<const double*>(x.data)[i * stride];
  else
    return py::none();
  return py::float_(total);
}

// Whether no parameter has a gradient yet, nor a hook that takes it away.
bool are_fresh(const py::list& parameters) {
  Attribute grads(names().grad, Attribute::kOfOneCall);
  Attribute hooks_after(names().post_accumulate_hooks, Attribute::kOfOneCall);
  for (py::handle parameter : parameters) {
    Object grad(grads.of(parameter.ptr()));
    if (!grad) throw py::error_already_set();
    if (grad.get() != Py_None) return false;
    Object hooks(hooks_after.of(parameter.ptr()));
    if (!hooks) throw py::error_already_set();
    int has_hooks = PyObject_IsTrue(hooks.get());
    if (has_hooks < 0) throw py::error_already_set();
    if (has_hooks) return false;
  }
  return true;
}

// Whether all parameters want gradients, and none has a hook that is told of them.
bool may_be_left_out(const py::list& parameters) {
  Attribute requires_grad(names().requires_grad, Attribute::kOfOneCall);
  Attribute hooks(names().backward_hooks, Attribute::kOfOneCall);
  for (py::handle parameter : parameters) {
    Object wants(requires_grad.of(parameter.ptr())), told(hooks.of(parameter.ptr()));
    if (!wants || !told) throw py::error_already_set();
    int has_hooks = PyObject_IsTrue(told.get());
    if (has_hooks < 0) throw py::error_already_set();
    if (has_hooks || wants.get() != Py_True) return false;
  }
  return true;
}

}  // namespace
}  // namespace host

void bind_host(py::module_& m) {
  using namespace host;
  py::module_ sub = m.def_submodule("host");
  if (!ready_hooks()) throw py::error_already_set();

  sub.def("learn", [](py::object tensor, py::object parameter, py::dict owners, py::object node,
                      py::object task, py::object handle) {
    learn_asked({owners.ptr(), node.ptr(), task.ptr(), handle.ptr()});
    return learn_tensors(tensor.ptr(), parameter.ptr());
  });
  sub.def("are_fresh", &are_fresh);
  sub.def("may_be_left_out", &may_be_left_out);
  sub.def("total", &total_of);
  sub.def("sum_of_squares", [](const py::list& parameters, const std::string& isa, int threads,
                               const py::object& out) {
    return sum_of_squares<float>(parameters, isa, threads, out) ||
           sum_of_squares<double>(parameters, isa, threads, out);
  });
  sub.def("each_square", [](const py::list& parameters, const std::string& isa, int threads,
                            const py::object& out) {
    py::object found = each_square<float>(parameters, isa, threads, out);
    return found.is_none() ? each_square<double>(parameters, isa, threads, out) : found;
  });

  py::class_<Wiring>(sub, "Wiring")
      .def(py::init([](py::list names, py::list types, py::list children, py::list leaves) {
        return std::make_unique<Wiring>(names.ptr(), types.ptr(), children.ptr(), leaves.ptr());
      }))
      .def("follow", [](const Wiring& self, py::object root, py::dict parameters) {
        Found found;
        int is_same = self.follow(root.ptr(), parameters.ptr(), found);
        if (is_same < 0) throw py::error_already_set();
        return is_same ? py::reinterpret_borrow<py::object>(found.nodes.get()) : py::none();
      });

  py::class_<Conditions>(sub, "Conditions")
      .def(py::init<>())
      .def("add_value",
           [](Conditions& self, int64_t node, py::str attribute, py::object value) {
             self.add_value(node, attribute.ptr(), value.ptr());
           })
      .def("add_shapes", [](Conditions& self, int64_t node,
                            py::object shapes) { self.add_shapes(node, shapes.ptr()); })
      .def("add_leaf", [](Conditions& self, int64_t node, py::tuple shape,
                          py::object leaf) { self.add_leaf(node, shape.ptr(), leaf.ptr()); })
      .def("add_type",
           [](Conditions& self, int64_t node, py::type type) { self.add_type(node, type.ptr()); })
      .def("hold", [](const Conditions& self, py::list nodes) {
        int held = self.hold(nodes.ptr(), {});
        if (held < 0) throw py::error_already_set();
        return held == 1;
      });

  using Place = std::pair<int64_t, int64_t>;
  using Axis = std::tuple<int, int64_t, int64_t, int64_t>;
  using Text = const std::string&;
  py::class_<Program>(sub, "Program")
      .def(py::init<std::string, std::string>())
      .def("__len__", &Program::size)
      .def("add_single_rows",
           [](Program& p, int64_t node, Text saved, Place to, py::dict required) {
             p.add(single_rows(node, saved, {to.first, to.second}, p.dtype(), p.isa()), required);
           })
      .def("add_sequences",
           [](Program& p, int64_t node, Text saved, Place to, Axis axis, double guard,
              py::dict required) {
             p.add(sequences(node, saved, {to.first, to.second}, layout_of(axis), guard, p.dtype(),
                             p.isa()),
                   required);
           })
      .def("add_fused_sequences",
           [](Program& p, int64_t node, Text saved, Place to, Axis axis, bool out_first,
              int64_t rows_at_a_time, Program::Gradients made, py::dict required) {
             const py::tuple& shape = std::get<1>(made.at(0));
             FusedDense known{out_first, shape[0].cast<int64_t>(), shape[1].cast<int64_t>(),
                              rows_at_a_time};
             p.add(fused_sequences(node, saved, {to.first, to.second}, layout_of(axis), known,
                                   p.dtype(), p.isa()),
                   required, made);
           })
      .def("add_layer_norm",
           [](Program& p, int64_t node, std::vector<std::string> saved, Place to, Axis axis,
              int trailing, py::dict required) {
             p.add(layer_norm(node, saved, {to.first, to.second}, layout_of(axis), trailing,
                              p.dtype(), p.isa()),
                   required);
           })
      .def("add_scale",
           [](Program& p, int64_t node, Text saved, int64_t to, Axis axis, py::dict required) {
             p.add(scale(node, saved, {to, -1}, layout_of(axis), p.dtype(), p.isa()), required);
           })
      .def("add_by_rule",
           [](Program& p, int64_t node, py::dict required) {
             p.add(std::make_unique<ByRule>(node), required);
           })
      .def("add_called",
           [](Program& p, int64_t node, std::vector<std::string> saved, bool minds_sign,
              py::dict required, Program::Gradients made) {
             p.add(std::make_unique<Called>(node, saved, minds_sign), required, made);
           })
      .def("launch", &Program::launch)
      .def("compute", &compute_step)
      .def("add_sum",
           [](Program& p, int64_t node, int64_t to, Axis axis) {
             p.add(sum(node, {to, -1}, layout_of(axis), p.dtype(), p.isa()), py::dict());
           })
      .def("add_table",
           [](Program& p, int64_t node, Text saved, int64_t to, Axis axis, int64_t padding,
              py::dict required) {
             p.add(table(node, saved, {to, -1}, layout_of(axis), padding, p.dtype(), p.isa()),
                   required);
           })
      .def("add_shared_table",
           [](Program& p, int64_t node, int64_t source, Text saved, int64_t to, Axis axis,
              int64_t padding, py::dict required, py::dict required_of_source) {
             auto step = shared_table(node, source, saved, {to, -1}, layout_of(axis), padding,
                                      p.dtype(), p.isa());
             for (auto item : required_of_source)
               step->require_of(source, item.first.ptr(), item.second.ptr());
             p.add(std::move(step), required);
           })
      .def("add_half", [](Program& p, int64_t node, Text saved, int64_t partner,
                          py::dict required) { p.add(half(node, saved, partner), required); })
      .def("add_tied", [](Program& p, int64_t node, Text saved, int64_t partner, int64_t to,
                          bool is_head_first, Axis head, double guard, Axis table, int64_t padding,
                          py::dict required, int64_t rows_at_a_time, Program::Gradients made) {
        Tied known{is_head_first,    layout_of(head), guard,
                   layout_of(table), padding,         rows_at_a_time};
        p.add(tied(node, saved, partner, {to, -1}, known, p.dtype(), p.isa()), required, made);
      });

  sub.def("has_driver", &has_driver);
  sub.def("counting_driver", [] { return reinterpret_cast<uintptr_t>(counting_driver()); });
  sub.def("launches_counted", &launches_counted);
  sub.def(
      "use_driver",
      [](uintptr_t launch, uintptr_t is_capturing) {
        use_driver(reinterpret_cast<void*>(launch), reinterpret_cast<void*>(is_capturing));
      },
      py::arg(), py::arg("is_capturing") = 0);
  sub.def("is_readable", [](py::object tensor) {
    dlpack::Tensor x;
    return read(tensor.ptr(), x);
  });
  py::class_<Launches, std::shared_ptr<Launches>>(sub, "Launches")
      .def(py::init([](const py::list& inputs, const std::vector<Described>& launches,
                       std::vector<int64_t> places, int64_t bytes, py::object kept) {
        return launches_of(inputs, launches, std::move(places), bytes, kept);
      }))
      .def("__len__", &Launches::size)
      .def_property_readonly("bytes", &Launches::bytes)
      .def("run", &run_launches);

  py::class_<Pass, std::shared_ptr<Pass>>(sub, "Pass")
      .def(py::init([](const Program& program, py::object session, py::object table,
                       py::object scratch, py::object arrival, bool by_task, int threads) {
        auto pass = std::make_shared<Pass>(program.steps(), session.ptr(), table.ptr(),
                                           scratch.ptr(), arrival.ptr(), by_task, threads);
        if (PyErr_Occurred()) throw py::error_already_set();
        return pass;
      }))
      .def_property_readonly("is_ready", &Pass::is_ready)
      .def("hook",
           [](const std::shared_ptr<Pass>& self, py::list nodes, const std::string& wanted) {
             return stolen(Pass::hook(self, nodes.ptr(), wanted));
           })
      .def("follow",
           [](const std::shared_ptr<Pass>& self, const Wiring& wiring, const Conditions& conditions,
              py::object root, py::dict parameters) {
             Object nodes;
             int found =
                 Pass::follow(self, wiring, conditions, root.ptr(), parameters.ptr(), nodes);
             if (found < 0) throw py::error_already_set();
             return found ? py::reinterpret_borrow<py::object>(nodes.get()) : py::none();
           })
      .def("gradients", [](Pass& self) { return stolen(self.gradients()); })
      .def("release",
           [](Pass& self) {
             if (self.release() != 0) throw py::error_already_set();
           })
      .def("close",
           [](Pass& self) {
             if (self.close() != 0) throw py::error_already_set();
           })
      .def_property_readonly("taken", [](const Pass& self) {
        return py::bytes(self.taken().data(), self.taken().size());
      });

  py::class_<Leaves, std::shared_ptr<Leaves>>(sub, "Leaves")
      .def(py::init([](py::object gradients, py::object squares, py::object arrival, bool by_task,
                       const std::string& isa, int threads) {
        auto leaves = std::make_shared<Leaves>(gradients.ptr(), squares.ptr(), arrival.ptr(),
                                               by_task, isa, threads);
        if (PyErr_Occurred()) throw py::error_already_set();
        return leaves;
      }))
      .def_property_readonly("is_ready", &Leaves::is_ready)
      .def_property_readonly("order", &Leaves::order)
      .def("hook",
           [](const std::shared_ptr<Leaves>& self, py::list nodes,
              const std::vector<int64_t>& numbers) {
             if (!Leaves::hook(self, nodes.ptr(), numbers)) throw py::error_already_set();
           })
      .def("leave_out", &Leaves::leave_out)
      .def("close", [](Leaves& self) {
        if (self.close() != 0) throw py::error_already_set();
      });
}

}  // namespace fastminima
