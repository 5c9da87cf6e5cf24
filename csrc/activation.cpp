// CPU: the elementwise activations, and the two with a learnt parameter (prelu, swish).
#include "activation_functors.h"
#include "channels.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

template <class F, class... P>
void unary_fwd(Out y, View x, P... parameters) {
  map<UnaryForward<F>, 1, 1>("activation forward", {F{parameters...}}, {y}, {x});
}

template <class F, class... P>
void unary_bwd(Out dx, View dy, View saved, P... parameters) {
  map<UnaryBackward<F>, 1, 2>("activation backward", {F{parameters...}}, {dx}, {dy, saved});
}

// The parameter comes expanded to the shape of x.
template <class F>
void parameter_fwd(Out y, View x, View parameter) {
  map<ParameterForward<F>, 1, 2>("activation forward", {}, {y}, {x, parameter});
}

template <class F>
void parameter_bwd(Out dx, Out dparameter, Out partials, View dy, View x, View parameter) {
  map_and_sum<F, 1, 2>("activation backward", {}, {dx}, {dy, x}, parameter, dparameter, partials);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define UNARY(name, F, parameters, ...)                                               \
  EXPORT(cpu, name##_fwd, "y, x" parameters, unary_fwd<F __VA_OPT__(, ) __VA_ARGS__>) \
  EXPORT(cpu, name##_bwd, "dx, dy, saved" parameters, unary_bwd<F __VA_OPT__(, ) __VA_ARGS__>)
#include "activation_list.h"

EXPORT(cpu, prelu_fwd, "y, x, weight", parameter_fwd<Prelu>)
EXPORT(cpu, prelu_bwd, "dx, dweight, partials, dy, x, weight", parameter_bwd<PreluBackward>)
EXPORT(cpu, swish_learnt_fwd, "y, x, beta", parameter_fwd<Swish>)
EXPORT(cpu, swish_learnt_bwd, "dx, dbeta, partials, dy, x, beta", parameter_bwd<SwishBackward>)
