# The C++ and its native tests without Python: under the sanitizers, for AArch64, and as far as the linker for macOS. The
# Makefile in the root calls this one from the root; it needs make and a compiler.
ARM_CXX ?= aarch64-linux-gnu-g++
QEMU ?= $(firstword $(shell command -v qemu-aarch64-static || command -v qemu-aarch64))
SECONDS ?= 60
OUT := build/native

SOURCES := $(wildcard csrc/common/*.cpp csrc/isa/*.cpp csrc/predictor/*.cpp csrc/search/*.cpp)
HEADERS := $(wildcard csrc/*/*.h)
COMMON := -std=c++20 -Wall -Wextra -g -Icsrc -pthread

asan := $(CXX) $(COMMON) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -DFASTLVM_ASAN
tsan := $(CXX) $(COMMON) -O1 -fsanitize=thread -DFASTLVM_TSAN
arm := $(ARM_CXX) $(COMMON) -O2 -static
macos := $(ZIG) c++ -target aarch64-macos.13.0 $(COMMON) -O1 $(PYTHON_INCLUDES)

vmath := $(CXX) $(COMMON) -O3

# The flags of CMakeLists.txt for the objects of one instruction set: of this machine, and of the arm build.
arm_neon_dotprod := -march=armv8.2-a+dotprod
arm_neon_i8mm := -march=armv8.2-a+i8mm
arm_neon_bf16 := -march=armv8.2-a+bf16
macos_neon_dotprod := -mcpu=generic+v8_2a+dotprod
macos_neon_i8mm := -mcpu=generic+v8_2a+i8mm
macos_neon_bf16 := -mcpu=generic+v8_2a+bf16
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
avx2 := -mavx2 -mfma -mf16c
avx512 := $(avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
avx512_vnni := $(avx512) -mavx512vnni
avx512_bf16 := $(avx512) -mavx512bf16
amx := -mamx-tile -mamx-int8 -mamx-bf16
avx512_amx := $(avx512) $(shell $(CXX) $(amx) -E -x c++ /dev/null >/dev/null 2>&1 && echo $(amx))
ISAS := scalar avx2 avx512
else ifneq ($(filter aarch64 arm64,$(shell uname -m)),)
neon_dotprod := $(arm_neon_dotprod)
neon_i8mm := $(arm_neon_i8mm)
neon_bf16 := $(arm_neon_bf16)
ISAS := scalar neon
else
ISAS := scalar
endif
vector_neon := -DFASTLVM_VECTOR_NEON
vector_avx2 := -DFASTLVM_VECTOR_AVX2
vector_avx512 := -DFASTLVM_VECTOR_AVX512

define build
$(OUT)/$(1)/%.o: csrc/%.cpp $(HEADERS) tests/csrc/native.mk
	@mkdir -p $$(@D)
	$$($(1)) $$($(addsuffix _,$(filter arm macos,$(1)))$$(notdir $$*)) -c $$< -o $$@
$(OUT)/$(1)/%: tests/csrc/%.cpp $(wildcard tests/csrc/*.h) $(SOURCES:csrc/%.cpp=$(OUT)/$(1)/%.o)
	$$($(1)) -include tests/csrc/sanitizers.h $$< $$(filter %.o,$$^) -o $$@
endef
$(foreach name,asan tsan arm macos,$(eval $(call build,$(name))))

define accuracy
$(OUT)/$(1)/vmath/%.o: tests/csrc/vmath_functions.cpp tests/csrc/vmath_functions.h $(HEADERS) tests/csrc/native.mk
	@mkdir -p $$(@D)
	$$($(1)) $$($$*) $$(vector_$$*) -DFASTLVM_ISA=$$* -c $$< -o $$@
$(OUT)/$(1)/vmath_accuracy: tests/csrc/vmath_accuracy.cpp $(patsubst %,$(OUT)/$(1)/vmath/%.o,$(2))
	$$($(1)) $$^ -o $$@
endef
$(eval $(call accuracy,vmath,$(ISAS)))
$(eval $(call accuracy,arm,scalar neon))

.PHONY: sanitize asan tsan arm arm-tools arm-run macos fuzz vmath
.DELETE_ON_ERROR:
.SECONDARY:

sanitize: asan tsan

asan: $(OUT)/asan/threads $(OUT)/asan/isa_parity $(OUT)/asan/model $(OUT)/asan/searches
	$(OUT)/asan/threads
	$(OUT)/asan/isa_parity 80
	$(OUT)/asan/model 80
	$(OUT)/asan/searches 80

# Where the kernel randomises more address bits than ThreadSanitizer knows of, setarch -R turns that off.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

tsan: $(OUT)/tsan/threads $(OUT)/tsan/isa_parity $(OUT)/tsan/model $(OUT)/tsan/searches
	@$(FIXED_ADDRESSES) $(OUT)/tsan/threads >$(OUT)/tsan/log 2>&1 || { cat $(OUT)/tsan/log >&2; \
	  ! grep -q 'unexpected memory mapping' $(OUT)/tsan/log || echo "ThreadSanitizer cannot run with this kernel's random" \
	  "addresses: allow setarch -R (personality) in this container, or set sysctl vm.mmap_rnd_bits=28" >&2; exit 1; }
	$(FIXED_ADDRESSES) $(OUT)/tsan/isa_parity 80
	$(FIXED_ADDRESSES) $(OUT)/tsan/model 80
	$(FIXED_ADDRESSES) $(OUT)/tsan/searches 80

arm: arm-tools
	@$(MAKE) --no-print-directory -f tests/csrc/native.mk arm-run

arm-tools:
	@{ command -v $(ARM_CXX) && test -n "$(QEMU)"; } >/dev/null || { echo "test-arm needs $(ARM_CXX) and qemu-aarch64:" \
	  "install the packages g++-aarch64-linux-gnu and qemu-user-static (Debian, Ubuntu)" >&2; exit 2; }

arm-run: $(OUT)/arm/threads $(OUT)/arm/isa_parity $(OUT)/arm/model $(OUT)/arm/searches $(OUT)/arm/vmath_accuracy
	$(QEMU) $(OUT)/arm/threads
	$(QEMU) $(OUT)/arm/isa_parity 80
	$(QEMU) $(OUT)/arm/model 80
	$(QEMU) $(OUT)/arm/searches 80
	$(QEMU) $(OUT)/arm/vmath_accuracy 1009

# A program of everything that knows nothing of Python, and the objects of the rest.
macos: $(OUT)/macos/model $(patsubst csrc/%.cpp,$(OUT)/macos/%.o,$(wildcard csrc/*.cpp csrc/bindings/*.cpp))

fuzz: $(OUT)/asan/fuzz
	$(OUT)/asan/fuzz $(SECONDS)

vmath: $(OUT)/vmath/vmath_accuracy
	$<
