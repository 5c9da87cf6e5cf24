// Python's side of the kernels: every Entry of the registry becomes
// torch.ops.pydl_<backend>.<name>, called boxed; tensors become Views; device, stream, dtype and
// errors are seen to here. No kernel is named here.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/library.h>

#if defined(PYDL_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <structmember.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "differentiable.h"
#include "parallel.h"
#include "pool.h"
#include "registry.h"

namespace pydl {

int64_t stream_bytes = int64_t{8} << 20;

// Whether the processor has AVX512-BF16.
static bool own_dots() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}
int dot_mode = own_dots() ? 1 : 0;

// Whether the processor has AMX-BF16 and Linux lets this process use its tile registers.
static bool own_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int64_t kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return own_dots() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
int tile_mode = own_tiles() ? 1 : 0;

static Entry*& first_entry() {
  static Entry* first = nullptr;
  return first;
}

bool enlist(Entry* entry) {
  entry->next = first_entry();
  first_entry() = entry;
  return true;
}

void fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw std::runtime_error(std::string("pydl: ") + text);
}

#if AT_PARALLEL_OPENMP && !defined(_OPENMP) && !defined(PYDL_EMULATION)
#error "compile module.cpp with -fopenmp: without it at::parallel_for runs on one thread"
#endif
void parallel_run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

namespace {

int machine_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

const char* level_name(int level) {
  return level == 2 ? "avx512" : level == 1 ? "avx2" : "baseline";
}

// What the machine has, or less where PYDL_CPU_LEVEL asks for less.
int chosen_level() {
  const int most = machine_level();
  const char* wanted = std::getenv("PYDL_CPU_LEVEL");
  if (wanted == nullptr || *wanted == 0) return most;
  for (int level = 0; level <= 2; ++level) {
    if (std::string(wanted) != level_name(level)) continue;
    if (level > most) {
      throw std::runtime_error(std::string("pydl: PYDL_CPU_LEVEL is ") + wanted +
                               ", but this CPU has " + level_name(most) + " at most");
    }
    return level;
  }
  throw std::runtime_error(std::string("pydl: PYDL_CPU_LEVEL is ") + wanted +
                           ", wants baseline, avx2 or avx512");
}

struct Function {
  const Entry* entry;
  std::string name;                    // pydl_cpu::gelu_fwd
  std::vector<std::string> arguments;  // names
  c10::DeviceType device;
  size_t count() const { return arguments.size(); }

  explicit Function(const Entry* e) : entry(e) {
    name = std::string("pydl_") + e->backend + "::" + e->name;
    const std::string list = e->names;
    for (size_t at = 0; at < list.size();) {
      const size_t comma = std::min(list.find(", ", at), list.size());
      arguments.push_back(list.substr(at, comma - at));
      at = comma + 2;
    }
    if (arguments.size() != std::string(e->kinds).size()) {
      throw std::logic_error("pydl: " + name + " names another number of arguments than it takes");
    }
#if defined(PYDL_EMULATION)
    device = c10::DeviceType::CPU;
#else
    device = std::string(e->backend) == "cuda" ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
#endif
  }

  std::string schema() const {
    std::string text = std::string(entry->name) + "(";
    char alias = 'a';
    for (size_t i = 0; i < count(); ++i) {
      if (i > 0) text += ", ";
      switch (entry->kinds[i]) {
        case 'o':
          text += std::string("Tensor(") + alias++ + "!) ";
          break;
        case 'v':
          text += "Tensor ";
          break;
        case 'm':
          text += "Tensor? ";
          break;
        case 'd':
          text += "float ";
          break;
        case 'i':
          text += "SymInt ";
          break;
        case 'b':
          text += "bool ";
          break;
        default:
          throw std::logic_error("pydl: " + name + " has an argument of a type without a schema");
      }
      text += arguments[i];
    }
    return text + ") -> ()";
  }
};

DType dtype_of(const Function& function, size_t i, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    case at::kDouble:
      return DType::f64;
    case at::kBool:
    case at::kByte:
      return DType::u8;
    case at::kLong:
      return DType::i64;
    default:
      fail("%s: %s is of dtype %s, wants float32, float16, bfloat16, float64, uint8, bool or int64",
           function.name.c_str(), function.arguments[i].c_str(),
           c10::toString(tensor.scalar_type()));
  }
}

// The arguments of one call, checked and as kernels see them.
class Call {
 public:
  explicit Call(const Function& function) : function_(function), device_(function.device) {
    if (function.count() > kMost) {
      fail("%s takes more than %zu arguments", function.name.c_str(), kMost);
    }
  }
  void set(size_t i, double number) { args_[i].number = number; }
  void set(size_t i, int64_t integer) { args_[i].integer = integer; }
  void set(size_t i, const at::Tensor& tensor) {
    if (!seen_) device_ = tensor.device();
    seen_ = true;
    if (tensor.device() != device_ || device_.type() != function_.device) {
      fail("%s: %s is on %s, wants %s", function_.name.c_str(), function_.arguments[i].c_str(),
           tensor.device().str().c_str(),
           (device_.type() == function_.device ? device_ : c10::Device(function_.device))
               .str()
               .c_str());
    }
    View& view = args_[i].view;
    view.dtype = dtype_of(function_, i, tensor);
    view.data = function_.entry->kinds[i] == 'o' ? tensor.mutable_data_ptr()
                                                 : const_cast<void*>(tensor.const_data_ptr());
    view.ndim = static_cast<int32_t>(tensor.dim());
    view.numel = tensor.numel();
    view.sizes = tensor.sizes().data();
    view.strides = tensor.strides().data();
  }
  void run() const {
    Stream stream;
#if defined(PYDL_CUDA)
    c10::cuda::OptionalCUDAGuard guard;
    if (device_.is_cuda()) {
      guard.set_device(device_);
      stream.handle = c10::cuda::getCurrentCUDAStream(device_.index()).stream();
    }
#endif
    function_.entry->call(stream, args_);
  }

 private:
  static constexpr size_t kMost = 40;
  const Function& function_;
  Arg args_[kMost];
  c10::Device device_;
  bool seen_ = false;
};

struct Kernel final : c10::OperatorKernel {
  Function function;
  explicit Kernel(Function f) : function(std::move(f)) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    Call call(function);
    const size_t count = function.count();
    const c10::IValue* values = stack->data() + (stack->size() - count);
    for (size_t i = 0; i < count; ++i) {
      const c10::IValue& value = values[i];
      const char kind = function.entry->kinds[i];
      if (kind == 'd') {
        call.set(i, value.toDouble());
      } else if (kind == 'i') {
        call.set(i, value.toInt());
      } else if (kind == 'b') {
        call.set(i, static_cast<int64_t>(value.toBool()));
      } else if (!value.isNone()) {
        call.set(i, value.toTensor());
      }
    }
    call.run();
    torch::jit::drop(*stack, count);
  }
};

// Under tracing, an output is as Python made it: there is nothing to do.
struct Traced final : c10::OperatorKernel {
  size_t count;
  explicit Traced(size_t n) : count(n) {}
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    torch::jit::drop(*stack, count);
  }
};

// (backend, name) -> its best entry at the chosen level.
const std::map<std::pair<std::string, std::string>, const Entry*>& chosen_entries() {
  static const auto* chosen = [] {
    auto* best = new std::map<std::pair<std::string, std::string>, const Entry*>;
    const int level = chosen_level();
    for (const Entry* e = first_entry(); e != nullptr; e = e->next) {
      if (e->level > level) continue;
      const Entry*& slot = (*best)[{e->backend, e->name}];
      if (slot == nullptr || slot->level < e->level) slot = e;
    }
    return best;
  }();
  return *chosen;
}

void register_ops() {
  // Kept for the life of the process, like the operators themselves.
  static auto* libraries = new std::map<std::string, std::unique_ptr<torch::Library>>;
  const auto library = [&](const std::string& backend) -> torch::Library& {
    auto& slot = (*libraries)[backend];
    if (!slot) {
      slot = std::make_unique<torch::Library>(torch::Library::DEF, "pydl_" + backend, std::nullopt,
                                              __FILE__, __LINE__);
    }
    return *slot;
  };
  for (const auto& [key, entry] : chosen_entries()) {
    Function function(entry);
    torch::Library& lib = library(entry->backend);
    lib.def(function.schema().c_str(), {at::Tag::pt2_compliant_tag});
    const auto key_of =
        function.device == c10::DeviceType::CUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
    const size_t count = function.count();
    lib.impl(entry->name,
             torch::dispatch(
                 key_of, torch::CppFunction::makeFromBoxedKernel(c10::BoxedKernel::makeFromFunctor(
                             std::make_unique<Kernel>(std::move(function))))));
    lib.impl(
        entry->name,
        torch::dispatch(c10::DispatchKey::Meta,
                        torch::CppFunction::makeFromBoxedKernel(
                            c10::BoxedKernel::makeFromFunctor(std::make_unique<Traced>(count)))));
  }
}

#if !defined(PYDL_EMULATION)
// An operator as Python calls it where nothing but its kernel has to see the call: what torch.ops
// does on the way, which takes longer than a small kernel, is left out. All other calls, under
// tracing, in a mode or of tensors that are special, go through the operator.
struct Direct {
  PyObject head;
  vectorcallfunc vectorcall;
  const Function* function;
  PyObject* operator_;
};

bool nothing_watches() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set - c10::autocast_dispatch_keyset).empty();
}

bool plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet special{
      DispatchKey::Python,           DispatchKey::PythonTLSSnapshot,
      DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper,
      DispatchKey::Functionalize,    DispatchKey::Conjugate,
      DispatchKey::Negative,         DispatchKey::ZeroTensor,
      DispatchKey::Sparse,           DispatchKey::SparseCsr,
      DispatchKey::Quantized,        DispatchKey::NestedTensor,
      DispatchKey::Batched};
  return tensor.layout() == at::kStrided && !tensor.key_set().has_any(special);
}

// Sets the arguments; false where the operator has to be called.
bool fill(Call& call, const Function& function, PyObject* const* arguments) {
  for (size_t i = 0; i < function.count(); ++i) {
    PyObject* const object = arguments[i];
    const char kind = function.entry->kinds[i];
    if (kind == 'd') {
      if (!PyFloat_CheckExact(object)) return false;
      call.set(i, PyFloat_AS_DOUBLE(object));
    } else if (kind == 'i' || kind == 'b') {
      if (kind == 'i' ? !PyLong_CheckExact(object) : !PyBool_Check(object)) return false;
      int overflow = 0;
      const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
      if (overflow != 0) return false;
      call.set(i, value);
    } else if (object != Py_None || kind != 'm') {
      if (!THPVariable_CheckExact(object)) return false;
      const at::Tensor& tensor = THPVariable_Unpack(object);
      if (!plain(tensor) || tensor.device().type() != function.device) return false;
      call.set(i, tensor);
    }
  }
  return true;
}

PyObject* direct_call(PyObject* self, PyObject* const* arguments, size_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  const Direct& direct = *reinterpret_cast<Direct*>(self);
  const Function& function = *direct.function;
  if (names == nullptr && static_cast<size_t>(PyVectorcall_NARGS(count)) == function.count() &&
      nothing_watches()) {
    Call call(function);
    if (fill(call, function, arguments)) {
      const pybind11::gil_scoped_release no_gil;
      at::RecordFunction record(at::RecordScope::FUNCTION);
      if (record.isActive()) record.before(function.name);
      call.run();
      Py_RETURN_NONE;
    }
  }
  return PyObject_Vectorcall(direct.operator_, arguments, count, names);
  END_HANDLE_TH_ERRORS
}

PyObject* direct_attribute(PyObject* self, PyObject* name) {
  return PyObject_GetAttr(reinterpret_cast<Direct*>(self)->operator_, name);
}
PyObject* direct_text(PyObject* self) {
  return PyObject_Str(reinterpret_cast<Direct*>(self)->operator_);
}

PyTypeObject* direct_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Direct, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_getattro, reinterpret_cast<void*>(&direct_attribute)},
                                {Py_tp_str, reinterpret_cast<void*>(&direct_text)},
                                {Py_tp_repr, reinterpret_cast<void*>(&direct_text)},
                                {Py_tp_members, members},
                                {0, nullptr}};
  static PyType_Spec spec{"pydl.Kernel", sizeof(Direct), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};
  static auto* const type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (type == nullptr) throw pybind11::error_already_set();
  return type;
}

// Lives as long as the process, like the operator.
pybind11::object direct(const std::string& backend, const std::string& name,
                        const pybind11::object& op) {
  const auto found = chosen_entries().find({backend, name});
  if (found == chosen_entries().end()) return op;
  auto* made = PyObject_New(Direct, direct_type());
  if (made == nullptr) throw pybind11::error_already_set();
  made->vectorcall = direct_call;
  made->function = new Function(found->second);
  made->operator_ = op.inc_ref().ptr();
  return pybind11::reinterpret_steal<pybind11::object>(reinterpret_cast<PyObject*>(made));
}

// torch.empty_like, with a large CPU tensor's memory from the pool.
PyObject* empty_like(PyObject*, PyObject* argument) {
  try {
    if (!THPVariable_Check(argument)) {
      PyErr_SetString(PyExc_TypeError, "pydl: empty_like wants a Tensor");
      return nullptr;
    }
    const at::Tensor& like = THPVariable_Unpack(argument);
    const bool ordinary = like.is_cpu() && plain(like) && nothing_watches();
    const bool large =
        ordinary && static_cast<int64_t>(like.nbytes()) >= kPoolMinimum && pool_info().cap > 0;
    if (!ordinary || (!large && !like.is_non_overlapping_and_dense())) {
      return THPVariable_Wrap(at::empty_like(like.detach()));
    }
    if (!large) {
      return THPVariable_Wrap(
          at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
    }
    at::Tensor made;
    if (like.is_non_overlapping_and_dense()) {
      made = at::detail::empty_strided_generic(like.sizes(), like.strides(), pool(),
                                               c10::DispatchKeySet(c10::DispatchKey::CPU),
                                               like.scalar_type());
    } else {
      const at::Tensor shape = at::empty_like(like.detach(), like.options().device(at::kMeta));
      made = at::detail::empty_strided_generic(shape.sizes(), shape.strides(), pool(),
                                               c10::DispatchKeySet(c10::DispatchKey::CPU),
                                               like.scalar_type());
    }
    return THPVariable_Wrap(made);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}
// empty(like, dtype, *sizes): torch.empty on the device of a tensor, with a large CPU tensor's
// memory from the pool.
PyObject* empty(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 3 || !THPVariable_Check(arguments[0]) || !THPDtype_Check(arguments[1])) {
    throw torch::TypeError("pydl: empty wants a Tensor, a dtype and sizes");
  }
  const at::Tensor& like = THPVariable_Unpack(arguments[0]);
  const at::ScalarType dtype = reinterpret_cast<THPDtype*>(arguments[1])->scalar_type;
  c10::SmallVector<int64_t, 4> sizes;
  for (Py_ssize_t i = 2; i < count; ++i) sizes.push_back(THPUtils_unpackLong(arguments[i]));
  if (like.is_cpu() && nothing_watches()) {
    int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
    for (const int64_t size : sizes) bytes *= size;
    if (bytes >= kPoolMinimum && pool_info().cap > 0) {
      return THPVariable_Wrap(at::detail::empty_generic(
          sizes, pool(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt));
    }
    return THPVariable_Wrap(at::detail::empty_cpu(sizes, dtype));
  }
  return THPVariable_Wrap(at::empty(sizes, at::TensorOptions().dtype(dtype).device(like.device())));
  END_HANDLE_TH_ERRORS
}
PyMethodDef empty_method{"empty",
                         reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty)),
                         METH_FASTCALL, nullptr};
PyMethodDef empty_like_method{"empty_like", empty_like, METH_O, nullptr};
PyMethodDef differentiable_method{"differentiable", differentiable, METH_VARARGS, nullptr};
#endif

}  // namespace
}  // namespace pydl

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace pydl;
#if !defined(PYDL_EMULATION)
  pool_info();  // a bad PYDL_POOL_BYTES is refused now, and not in the middle of a call
#endif
  register_ops();
  m.def("entries", [] {
    std::vector<std::tuple<std::string, std::string, std::string, std::string>> list;
    for (const auto& [key, entry] : chosen_entries()) {
      list.emplace_back(entry->backend, entry->name, Function(entry).schema(),
                        level_name(entry->level));
    }
    return list;
  });
  m.def("cpu_level", [] { return std::string(level_name(chosen_level())); });
  m.def("machine_level", [] { return std::string(level_name(machine_level())); });
  m.def(
      "parallel_threads",
      [](int64_t pieces) {
        std::mutex mutex;
        std::set<std::thread::id> seen;
        pydl::parallel_for(pieces, 1, [&](int64_t, int64_t) {
          const std::lock_guard<std::mutex> lock(mutex);
          seen.insert(std::this_thread::get_id());
        });
        return seen.size();
      },
      "How many threads share a loop of so many pieces.");
  m.def("set_dot_mode", [](int mode) {
    if (mode == 1 && !own_dots()) throw std::runtime_error("pydl: this processor has no VDPBF16PS");
    std::swap(dot_mode, mode);
    return mode;
  });
  m.def("set_tile_mode", [](int mode) {
    if (mode == 1 && !own_tiles()) throw std::runtime_error("pydl: no AMX-BF16 on this machine");
    std::swap(tile_mode, mode);
    return mode;
  });
  m.def(
      "bf16_products",
      [] {
        const bool pairs = dot_mode == 1 && chosen_level() == 2;
        return std::string(!pairs ? "fp32" : tile_mode == 1 ? "AMX-BF16" : "AVX512-BF16");
      },
      "The instructions that multiply bf16 numbers.");
  m.def("set_stream_bytes", [](int64_t bytes) {
    std::swap(stream_bytes, bytes);
    return bytes;
  });
#if !defined(PYDL_EMULATION)
  m.def("pool_info", [] {
    const PoolInfo info = pool_info();
    return std::map<std::string, int64_t>{{"cap", info.cap},
                                          {"cached", info.cached},
                                          {"in_use", info.in_use},
                                          {"reused", info.reused},
                                          {"requests", info.requests}};
  });
  m.def("direct", &direct);
  m.def("pool_empty", &pool_empty);
  m.def("pool_set_cap", &pool_set_cap);
  m.attr("empty_like") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&empty_like_method, nullptr));
  m.attr("empty") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&empty_method, nullptr));
  m.attr("differentiable") = pybind11::reinterpret_steal<pybind11::object>(
      PyCFunction_New(&differentiable_method, nullptr));
#endif
}
