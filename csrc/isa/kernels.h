// The table of one ISA: every op, compiled under the flags of the file that includes this. See common/vec.h.
#pragma once

#include "ops/causal_conv1d.h"
#include "ops/causal_conv1d_bwd.h"
#include "ops/ssm_scan.h"
#include "ops/ssm_scan_bwd.h"
#include "predictor/linear.h"

#define FASTLVM_TEXT_OF(x) #x
#define FASTLVM_TEXT(x) FASTLVM_TEXT_OF(x)

namespace fastlvm::FASTLVM_ISA {

inline void ssm_scan(const SsmScan& args) { args.float64 ? ssm::forward<Double>(args) : ssm::forward<Vec>(args); }

inline void ssm_scan_bwd(const SsmScanBwd& args) {
  args.forward.float64 ? ssm::Backward<Double>(args).run() : ssm::Backward<Vec>(args).run();
}

inline void causal_conv1d(const CausalConv1d& args) {
  args.float64 ? conv::Forward<Double>(args).run() : conv::Forward<Vec>(args).run();
}

inline void causal_conv1d_bwd(const CausalConv1dBwd& args) {
  args.forward.float64 ? conv::Backward<Double>(args).run() : conv::Backward<Vec>(args).run();
}

inline constexpr Kernels kernels = {FASTLVM_TEXT(FASTLVM_ISA), ssm_scan,       ssm_scan_bwd, causal_conv1d,
                                    causal_conv1d_bwd,         linear::forward};

}  // namespace fastlvm::FASTLVM_ISA
