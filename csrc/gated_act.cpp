// CPU: y = act(gate) up, the gated linear units (Shazeer 2020, arXiv 2002.05202).
#include "activation_functors.h"
#include "elementwise.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

void gated_act_fwd(Out y, View gate, View up, int64_t act, double parameter) {
  check_activation("gated_act", act);
  with_activation(act, parameter, [&](auto f) {
    map<GatedForward<decltype(f)>, 1, 2>("gated_act", {f}, {y}, {gate, up});
  });
}

void gated_act_bwd(Out dgate, Out dup, View dy, View gate, View up, int64_t act, double parameter) {
  check_activation("gated_act", act);
  with_activation(act, parameter, [&](auto f) {
    map<GatedBackward<decltype(f)>, 2, 3>("gated_act", {f}, {dgate, dup}, {dy, gate, up});
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, gated_act_fwd, "y, gate, up, act, parameter", gated_act_fwd)
EXPORT(cpu, gated_act_bwd, "dgate, dup, dy, gate, up, act, parameter", gated_act_bwd)
