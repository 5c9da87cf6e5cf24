// CUDA: the elementwise activations, and the two with a learnt parameter (prelu, swish).
#include "activation_functors.h"
#include "channels.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

template <class F, class... P>
void unary_fwd(Stream stream, Out y, View x, P... parameters) {
  const F f{parameters...};
  map<kFlatFast, 1, 1>(stream, "activation forward", UnaryForward<F>{f},
                       UnaryForward<AnyActivation>{any_of(f)}, {y}, {x});
}

template <class F, class... P>
void unary_bwd(Stream stream, Out dx, View dy, View saved, P... parameters) {
  const F f{parameters...};
  map<kFlatFast, 1, 2>(stream, "activation backward", UnaryBackward<F>{f},
                       UnaryBackward<AnyActivation>{any_of(f)}, {dx}, {dy, saved});
}

// The parameter comes expanded to the shape of x.
template <class F>
void parameter_fwd(Stream stream, Out y, View x, View parameter) {
  const ParameterForward<F> f;
  map<kPackedFast, 1, 2>(stream, "activation forward", f, f, {y}, {x, parameter});
}

template <class F>
void parameter_bwd(Stream stream, Out dx, Out dparameter, Out partials, View dy, View x,
                   View parameter) {
  const F f;
  map_and_sum<1, 2>(stream, "activation backward", f, f, {dx}, {dy, x}, parameter, dparameter,
                    partials);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define UNARY(name, F, parameters, ...)                                                \
  EXPORT(cuda, name##_fwd, "y, x" parameters, unary_fwd<F __VA_OPT__(, ) __VA_ARGS__>) \
  EXPORT(cuda, name##_bwd, "dx, dy, saved" parameters, unary_bwd<F __VA_OPT__(, ) __VA_ARGS__>)
#include "activation_list.h"

EXPORT(cuda, prelu_fwd, "y, x, weight", parameter_fwd<Prelu>)
EXPORT(cuda, prelu_bwd, "dx, dweight, partials, dy, x, weight", parameter_bwd<PreluBackward>)
EXPORT(cuda, swish_learnt_fwd, "y, x, beta", parameter_fwd<Swish>)
EXPORT(cuda, swish_learnt_bwd, "dx, dbeta, partials, dy, x, beta", parameter_bwd<SwishBackward>)
