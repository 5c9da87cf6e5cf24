#include "differentiable.h"

#include <ATen/Functions.h>
#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/custom_class.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace pydl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What Python's Rule says, as far as a call wants it. Lives as long as the process.
struct Op {
  std::string name;
  int64_t number;
  Py_ssize_t tensors, outputs, shown;
  PyObject *forward, *saves, *backward;  // saves may be null
};

std::vector<std::unique_ptr<Op>>& all_ops() {
  static auto* ops = new std::vector<std::unique_ptr<Op>>;
  return *ops;
}

[[noreturn]] void rethrow() {
  python_error error;
  error.persist();
  throw error;
}

struct Held : torch::CustomClassHolder {
  PyObject* object;
  explicit Held(PyObject* o) : object(o) { Py_INCREF(object); }
  ~Held() override {
    const pybind11::gil_scoped_acquire gil;
    Py_DECREF(object);
  }
};

// Numbers, strings and tensors as such, and a dtype as a list of its number, which compiled
// autograd can follow; the rest as objects, which it refuses.
c10::IValue to_ivalue(PyObject* object) {
  if (object == Py_None) return {};
  if (PyBool_Check(object)) return object == Py_True;
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (PyLong_CheckExact(object)) {
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow == 0) return value;
  }
  if (PyUnicode_CheckExact(object)) return std::string(PyUnicode_AsUTF8(object));
  if (THPVariable_Check(object)) return THPVariable_Unpack(object);
  if (THPDtype_Check(object)) {
    const auto type = reinterpret_cast<THPDtype*>(object)->scalar_type;
    return c10::List<int64_t>({static_cast<int64_t>(type)});
  }
  return c10::IValue::make_capsule(c10::make_intrusive<Held>(object));
}

PyObject* to_python(const c10::IValue& value) {
  if (value.isBool()) return PyBool_FromLong(value.toBool());
  if (value.isDouble()) return PyFloat_FromDouble(value.toDouble());
  if (value.isInt()) return PyLong_FromLongLong(value.toInt());
  if (value.isString()) {
    const std::string& text = value.toStringRef();
    return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
  }
  if (value.isTensor()) return THPVariable_Wrap(value.toTensor());
  if (value.isList()) {
    const auto type = static_cast<at::ScalarType>(value.toListRef()[0].toInt());
    PyObject* dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(type));
    Py_INCREF(dtype);
    return dtype;
  }
  if (value.isCapsule()) {
    PyObject* object = static_cast<Held*>(value.toCapsule().get())->object;
    Py_INCREF(object);
    return object;
  }
  Py_RETURN_NONE;
}

// A new tuple of `count` objects, the i-th made by make(i), which returns a new reference.
template <class Make>
PyObject* make_tuple(size_t count, const Make& make) {
  THPObjectPtr tuple(PyTuple_New(static_cast<Py_ssize_t>(count)));
  if (!tuple) throw python_error();
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = make(i);
    if (object == nullptr) throw python_error();
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), object);
  }
  return tuple.release();
}

PyObject* tuple_of(const variable_list& tensors) {
  return make_tuple(tensors.size(), [&](size_t i) { return THPVariable_Wrap(tensors[i]); });
}

// Kernels read memory, which a ZeroTensor has none of.
at::Tensor with_memory(const at::Tensor& gradient) {
  if (!gradient.defined() || !gradient._is_zerotensor()) return gradient;
  return at::zeros(gradient.sizes(), gradient.options()).add(gradient);
}

at::Tensor tensor_of(const Op& op, PyObject* object) {
  if (object == Py_None) return {};
  if (!THPVariable_Check(object)) {
    throw torch::TypeError("pydl: " + op.name + ": got " + Py_TYPE(object)->tp_name +
                           ", wants a Tensor or None");
  }
  return THPVariable_Unpack(object);
}

struct OpFunction : torch::autograd::Function<OpFunction> {
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto& data = context->saved_data;
    const Op& op = *all_ops()[static_cast<size_t>(data["op"].toInt())];
    variable_list result(static_cast<size_t>(op.tensors));
    bool any = false;
    for (const auto& gradient : gradients) any = any || gradient.defined();
    if (!any) return result;
    const variable_list saved = context->get_saved_variables();

    const pybind11::gil_scoped_acquire gil;
    try {
      THPObjectPtr backend(to_python(data["backend"]));
      THPObjectPtr dys(make_tuple(
          gradients.size(), [&](size_t i) { return THPVariable_Wrap(with_memory(gradients[i])); }));
      THPObjectPtr tensors(tuple_of(saved));
      THPObjectPtr scalars(make_tuple(
          data.size() - 2, [&](size_t i) { return to_python(data[std::to_string(i)]); }));
      THPObjectPtr needs(make_tuple(
          result.size(), [&](size_t i) { return PyBool_FromLong(context->needs_input_grad(i)); }));
      THPObjectPtr got(PyObject_CallFunctionObjArgs(op.backward, backend.get(), dys.get(),
                                                    tensors.get(), scalars.get(), needs.get(),
                                                    nullptr));
      if (!got) throw python_error();
      THPObjectPtr sequence(PySequence_Fast(got.get(), "pydl: backward wants a tuple"));
      if (!sequence) throw python_error();
      TORCH_CHECK(PySequence_Fast_GET_SIZE(sequence.get()) == op.tensors, "pydl: ", op.name,
                  ": backward gave ", PySequence_Fast_GET_SIZE(sequence.get()),
                  " gradients, wants ", op.tensors);
      for (size_t i = 0; i < result.size(); ++i) {
        result[i] =
            tensor_of(op, PySequence_Fast_GET_ITEM(sequence.get(), static_cast<Py_ssize_t>(i)));
      }
    } catch (const python_error&) {
      if (PyErr_Occurred() != nullptr) rethrow();
      throw;
    }
    return result;
  }
};

struct OpNode : torch::autograd::CppNode<OpFunction> {
  const Op& op;
  explicit OpNode(const Op& o) : op(o) {}
  std::string name() const override { return op.name + "Backward"; }
};

// torch counts references to nodes in one way or the other, by version.
template <class Pointer, class Made = OpNode>
Pointer new_node(const Op& op) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(new Made(op), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Made>(op);
  }
}

PyObject* call(const Op& op, PyObject* const* arguments, Py_ssize_t count) {
  using NodePointer = decltype(torch::autograd::Edge::function);
  TORCH_CHECK(count > op.tensors, "pydl: ", op.name, ": ", count - 1, " arguments, wants ",
              op.tensors, " tensors and scalars");
  at::RecordFunction record(at::RecordScope::FUNCTION);
  if (record.isActive()) {
    record.before(op.name, static_cast<int64_t>(at::sequence_number::peek()));
  }
  const auto tensors = static_cast<size_t>(op.tensors), outputs = static_cast<size_t>(op.outputs);
  variable_list given(tensors);
  for (size_t i = 0; i < tensors; ++i) given[i] = tensor_of(op, arguments[1 + i]);

  const NodePointer pointer = new_node<NodePointer>(op);
  auto& node = static_cast<OpNode&>(*pointer);
  node.set_ctx_grad_fn(pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(given));
  node.is_variable_input_.assign(tensors, true);
  auto& context = node.ctx_;
  context.set_materialize_grads(false);
  context.saved_data["op"] = op.number;
  context.saved_data["backend"] = to_ivalue(arguments[0]);
  for (Py_ssize_t i = 1 + op.tensors; i < count; ++i) {
    context.saved_data[std::to_string(i - 1 - op.tensors)] = to_ivalue(arguments[i]);
  }

  THPObjectPtr out;
  {
    const at::AutoGradMode off(false);
    out = PyObject_Vectorcall(op.forward, arguments, static_cast<size_t>(count), nullptr);
  }
  if (!out) throw python_error();
  // What forward returned, as a tuple: the outputs, then what comes along for backward.
  THPObjectPtr made(PyTuple_Check(out.get()) ? out.release() : PyTuple_Pack(1, out.get()));
  if (!made) throw python_error();
  const auto several = static_cast<size_t>(PyTuple_GET_SIZE(made.get()));
  TORCH_CHECK(several >= outputs, "pydl: ", op.name, ": forward gave ", several, " outputs, wants ",
              outputs);
  for (size_t i = 0; i < outputs; ++i) {
    at::Tensor one = tensor_of(op, PyTuple_GET_ITEM(made.get(), static_cast<Py_ssize_t>(i)));
    for (const auto& tensor : given) {
      TORCH_INTERNAL_ASSERT(!one.is_same(tensor), "pydl: ", op.name, ": an input is its output");
    }
    torch::autograd::set_history(one, pointer);
  }

  variable_list saved = given;
  if (op.saves != nullptr) {
    THPObjectPtr inputs(make_tuple(tensors, [&](size_t i) {
      Py_INCREF(arguments[1 + i]);
      return arguments[1 + i];
    }));
    THPObjectPtr first(PyTuple_GetSlice(made.get(), 0, op.outputs));
    if (!first) throw python_error();
    THPObjectPtr kept(PyObject_CallFunctionObjArgs(op.saves, inputs.get(), first.get(), nullptr));
    if (!kept) throw python_error();
    saved.clear();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kept.get()); ++i) {
      saved.push_back(tensor_of(op, PyTuple_GET_ITEM(kept.get(), i)));
    }
  }
  for (size_t i = outputs; i < several; ++i) {
    saved.push_back(tensor_of(op, PyTuple_GET_ITEM(made.get(), static_cast<Py_ssize_t>(i))));
  }
  context.save_for_backward(std::move(saved));
  node.save_variables_to_ctx();

  if (op.shown == 0) return made.release();
  if (op.shown > 1) return PyTuple_GetSlice(made.get(), 0, op.shown);
  PyObject* only = PyTuple_GET_ITEM(made.get(), 0);
  Py_INCREF(only);
  return only;
}

PyObject* call_method(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return call(*static_cast<Op*>(PyCapsule_GetPointer(self, nullptr)), arguments, count);
  END_HANDLE_TH_ERRORS
}

PyMethodDef method{"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_method)),
                   METH_FASTCALL, "call(backend, *tensors, *scalars)"};

}  // namespace

PyObject* differentiable(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  auto op = std::make_unique<Op>();
  if (!PyArg_ParseTuple(arguments, "snnnOOO:differentiable", &name, &op->tensors, &op->outputs,
                        &op->shown, &op->forward, &op->saves, &op->backward)) {
    return nullptr;
  }
  op->name = name;
  op->number = static_cast<int64_t>(all_ops().size());
  Py_INCREF(op->forward);
  Py_INCREF(op->backward);
  if (op->saves == Py_None) op->saves = nullptr;
  Py_XINCREF(op->saves);
  THPObjectPtr self(PyCapsule_New(op.get(), nullptr, nullptr));
  if (!self) return nullptr;
  all_ops().push_back(std::move(op));
  return PyCFunction_New(&method, self.get());
}

}  // namespace pydl
