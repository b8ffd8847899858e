// The table of one ISA: every op, compiled under the flags of the file that includes this. See common/vec.h.
#pragma once

#include "ops/causal_conv1d.h"
#include "ops/causal_conv1d_bwd.h"
#include "ops/causal_conv1d_step.h"
#include "ops/info_nce.h"
#include "ops/mamba_step.h"
#include "ops/ssd_scan.h"
#include "ops/ssd_scan_bwd.h"
#include "ops/ssd_step.h"
#include "ops/ssm_scan.h"
#include "ops/ssm_scan_bwd.h"
#include "ops/ssm_step.h"
#include "predictor/forward.h"
#include "search/scan.h"

#define FASTLVM_TEXT_OF(x) #x
#define FASTLVM_TEXT(x) FASTLVM_TEXT_OF(x)

#include "predictor/dot.h"

namespace fastlvm::FASTLVM_ISA {

inline void ssm_scan(const SsmScan& args) {
  args.float64 ? ssm::Forward<Double>(args).run() : ssm::Forward<Vec>(args).run();
}

inline void ssm_scan_bwd(const SsmScanBwd& args) {
  args.forward.float64 ? ssm::Backward<Double>(args).run() : ssm::Backward<Vec>(args).run();
}

inline void ssd_scan(const SsdScan& args) { args.float64 ? ssd::forward<Double>(args) : ssd::forward<Vec>(args); }

inline void ssd_scan_bwd(const SsdScanBwd& args) {
  args.forward.float64 ? ssd::Backward<Double>(args).run() : ssd::Backward<Vec>(args).run();
}

inline void causal_conv1d(const CausalConv1d& args) {
  args.float64 ? conv::Forward<Double>(args).run() : conv::Forward<Vec>(args).run();
}

inline void causal_conv1d_bwd(const CausalConv1dBwd& args) {
  args.forward.float64 ? conv::Backward<Double>(args).run() : conv::Backward<Vec>(args).run();
}

inline void info_nce(const InfoNce& args) { args.float64 ? nce::Loss<Double>(args).run() : nce::Loss<Vec>(args).run(); }

inline void info_nce_bwd(const InfoNceBwd& args) {
  args.forward.float64 ? nce::Gradient<Double>(args).run() : nce::Gradient<Vec>(args).run();
}

inline void ssm_step(const SsmStep& args) {
  args.float64 ? ssm_one::forward<Double>(args) : ssm_one::forward<Vec>(args);
}

inline void causal_conv1d_step(const CausalConv1dStep& args) {
  args.float64 ? conv_one::forward<Double>(args) : conv_one::forward<Vec>(args);
}

inline void ssd_step(const SsdStep& args) {
  args.float64 ? ssd_one::forward<Double>(args) : ssd_one::forward<Vec>(args);
}

inline void mamba_step(const MambaStep& args) {
  args.float64 ? mamba_one::Block<Double>(args).run() : mamba_one::Block<Vec>(args).run();
}

inline constexpr Kernels kernels = {FASTLVM_TEXT(FASTLVM_ISA),
                                    ssm_scan,
                                    ssm_scan_bwd,
                                    ssd_scan,
                                    ssd_scan_bwd,
                                    causal_conv1d,
                                    causal_conv1d_bwd,
                                    info_nce,
                                    info_nce_bwd,
                                    ssm_step,
                                    causal_conv1d_step,
                                    ssd_step,
                                    mamba_step,
                                    predict::forward,
                                    {{&product::fp32, &product::bf16, &product::int8}},
                                    search::kernels};

}  // namespace fastlvm::FASTLVM_ISA
