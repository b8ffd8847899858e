// The Metal Shading Language that kernels/metal uses, as C++ for the host: enough to compile those files as they are and
// to run a launch thread by thread.
//
// The threads of a threadgroup are fibers. One runs until it waits at a threadgroup barrier or at a SIMD operation;
// a SIMD operation happens once all lanes of its simdgroup are at it, a barrier once all threads of the threadgroup
// are. What else would wait for ever is an error, as are
// - an access outside a buffer,
// - two threads at one address, one of them writing, without a barrier for that memory between them, or in two
//   threadgroups of a launch,
// - a lane that reads from a lane that does not exist.
// Loads, stores and calls of exp and log are counted.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__x86_64__) && defined(__ELF__) && !defined(EMU_UCONTEXT)
#define EMU_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

typedef unsigned int uint;
typedef unsigned short ushort;

#define EMU_CALLED __attribute__((noinline))  // compiles in half the time
#define thread
#define constant const

// What the tests put in the place of an array in threadgroup memory: every access is watched.
#define SHARED(T, name, size) static emu::Shared<T, (size)> name

namespace emu {

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline uint16_t half_bits(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // rounds beyond the largest
  if (rest < 0x38800000u) {                        // subnormal: in steps of 2^-24
    return sign | uint16_t(lrintf(float_of(rest) * 16777216.0f));
  }
  return sign | uint16_t((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

inline float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 0x3ffu;
  if (exponent == 0) return float_of(sign | bits_of(float(fraction) * 0x1p-24f));
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  return float_of(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline uint16_t bfloat_bits(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return u >> 16 | 0x40u;
  return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

}  // namespace emu

struct half {
  uint16_t bits;
  half() = default;
  half(float x) : bits(emu::half_bits(x)) {}
  operator float() const { return emu::half_value(bits); }
};

struct bfloat {  // no conversion to it goes unsaid
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) : bits(emu::bfloat_bits(x)) {}
  operator float() const { return emu::float_of(uint32_t(bits) << 16); }
};

typedef half float16_t;
typedef bfloat bfloat16_t;

struct uint3 {
  uint x, y, z;
};

namespace emu {

struct Error {
  char text[240];
};

struct Array {  // as the harness gives it; counters are its results
  const char* name;
  char* data;      // the first element
  int64_t lowest;  // elements that may be touched, relative to it
  int64_t highest;
  const int* shape;
  const int64_t* strides;
  int rank;
  int64_t loads, stores;            // by threads
  int64_t group_loads, group_stores;  // of different elements of a threadgroup
};

struct Call {
  Array* arrays;
  int grid[3], group[3];
  int most_columns;  // of threadgroups, along x, that are run; 0 for all
  int ulps;          // by which exp, exp2 and log are off, at most
  int64_t exps, logs, barriers, simd_ops;
  char error[256];
};

constexpr int LANES = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 256 * 1024;

struct Touch {  // who touched an element last; all zero: nobody, as threadgroups count from 1
  int write_group, write_thread, write_epoch;
  int read_group, read_thread, read_epoch;  // thread -2: several
  bool other_groups_read;
};

enum State { RUNNING, AT_BARRIER, AT_SIMD, DONE };

struct Fiber {
  void* stack_pointer;
#if !defined(EMU_ASSEMBLY)
  ucontext_t context;
#endif
  State state;
  int line, kind;
  int simd_count;
  int flags;
};

struct Engine {
  Call* call;
  Fiber fibers[MOST_THREADS];
  char* stacks = nullptr;
  void* scheduler;
#if !defined(EMU_ASSEMBLY)
  ucontext_t scheduler_context;
#endif
  int current, threads, group, device_epoch, shared_epoch;
  uint64_t slots[2][MOST_THREADS];
  bool failed;
  Error error;
  void (*body)(void*, int);
  void* body_data;
};

static Engine engine;

[[noreturn]] __attribute__((noinline)) static void fail(const char* format, const char* a, long x = 0, long y = 0,
                                                       long z = 0) {
  Error e;
  snprintf(e.text, sizeof e.text, format, a, x, y, z);
  throw e;
}

#if defined(EMU_ASSEMBLY)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
#endif

static void to_scheduler(Fiber& f) {
#if defined(EMU_ASSEMBLY)
  emu_switch(&f.stack_pointer, engine.scheduler);
#else
  swapcontext(&f.context, &engine.scheduler_context);
#endif
}

static void to_fiber(Fiber& f) {
#if defined(EMU_ASSEMBLY)
  emu_switch(&engine.scheduler, f.stack_pointer);
#else
  swapcontext(&engine.scheduler_context, &f.context);
#endif
}

static void fiber_main() {
  try {
    engine.body(engine.body_data, engine.current);
  } catch (Error& e) {
    engine.failed = true;
    engine.error = e;
  }
  Fiber& f = engine.fibers[engine.current];
  f.state = DONE;
  for (;;) to_scheduler(f);
}

static void start(int i) {
  Fiber& f = engine.fibers[i];
  f.state = RUNNING;
  f.simd_count = 0;
#if defined(EMU_ASSEMBLY)
  char* top = engine.stacks + STACK * (i + 1);
  void** frame = (void**)top - 2;  // the entry is called: its stack is 8 off a multiple of 16
  *frame = (void*)fiber_main;
  memset(frame - 6, 0, 6 * sizeof(void*));
  f.stack_pointer = frame - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = engine.stacks + STACK * i;
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

static void resume(int i) {
  engine.current = i;
  engine.fibers[i].state = RUNNING;
  to_fiber(engine.fibers[i]);
}

// Runs a simdgroup until all of its lanes are at a barrier or done.
static void run_simdgroup(int first, int end) {
  for (int i = first; i < end && !engine.failed; ++i) resume(i);
  for (;;) {
    if (engine.failed) return;
    int at_simd = 0;
    for (int i = first; i < end; ++i) at_simd += engine.fibers[i].state == AT_SIMD;
    if (!at_simd) return;
    const Fiber& lead = engine.fibers[first];
    for (int i = first; i < end; ++i) {
      const Fiber& f = engine.fibers[i];
      if (f.state != AT_SIMD || f.line != lead.line || f.kind != lead.kind)
        fail("%s: lanes diverge at a SIMD operation (line %ld, lane %ld)", "simdgroup", lead.line, i - first);
    }
    ++engine.call->simd_ops;
    for (int i = first; i < end && !engine.failed; ++i) resume(i);
  }
}

static void run_group(int threads) {
  engine.threads = threads;
  engine.device_epoch = engine.shared_epoch = 0;
  for (int i = 0; i < threads; ++i) start(i);
  for (;;) {
    for (int first = 0; first < threads; first += LANES)
      run_simdgroup(first, first + LANES < threads ? first + LANES : threads);
    if (engine.failed) return;
    int done = 0, line = engine.fibers[0].line;
    for (int i = 0; i < threads; ++i) done += engine.fibers[i].state == DONE;
    if (done == threads) return;
    if (done) fail("%s: %ld of %ld threads ended before a barrier (line %ld)", "threadgroup", done, threads, line);
    for (int i = 0; i < threads; ++i)
      if (engine.fibers[i].line != line)
        fail("%s: threads wait at two barriers (lines %ld and %ld)", "threadgroup", line, engine.fibers[i].line);
    ++engine.call->barriers;
    const int flags = engine.fibers[0].flags;
    engine.device_epoch += flags & 1;
    engine.shared_epoch += flags >> 1 & 1;
  }
}

// `epoch` counts the barriers for this kind of memory; elements of device memory are shared by all threadgroups.
EMU_CALLED static void touch_read(Touch& t, const char* name, long at, int epoch, Array* counts) {
  if (t.write_group > 0) {
    if (t.write_group != engine.group)
      fail("%s[%ld] is read in threadgroup %ld and written in threadgroup %ld", name, at, engine.group, t.write_group);
    if (t.write_thread != engine.current && t.write_epoch == epoch)
      fail("%s[%ld] is read by thread %ld and written by thread %ld with no barrier between", name, at, engine.current,
           t.write_thread);
  }
  if (t.read_group != engine.group) {
    if (t.read_group > 0) t.other_groups_read = true;
    if (counts) ++counts->group_loads;
    t.read_group = engine.group;
    t.read_epoch = -1;
  }
  if (t.read_epoch != epoch) {
    t.read_epoch = epoch;
    t.read_thread = engine.current;
  } else if (t.read_thread != engine.current) {
    t.read_thread = -2;
  }
}

EMU_CALLED static void touch_write(Touch& t, const char* name, long at, int epoch, Array* counts) {
  if (t.write_group > 0 && t.write_group != engine.group)
    fail("%s[%ld] is written in threadgroups %ld and %ld", name, at, t.write_group, engine.group);
  if (t.write_group > 0 && t.write_thread != engine.current && t.write_epoch == epoch)
    fail("%s[%ld] is written by threads %ld and %ld with no barrier between", name, at, t.write_thread, engine.current);
  if (t.other_groups_read || (t.read_group > 0 && t.read_group != engine.group))
    fail("%s[%ld] is written in threadgroup %ld and read in another", name, at, engine.group);
  if (t.read_group > 0 && t.read_epoch == epoch && t.read_thread != engine.current)
    fail("%s[%ld] is written by thread %ld and read by thread %ld with no barrier between", name, at, engine.current,
         t.read_thread);
  if (counts && t.write_group != engine.group) ++counts->group_stores;
  t.write_group = engine.group;
  t.write_thread = engine.current;
  t.write_epoch = epoch;
}

struct Memory {  // one buffer of a launch
  Array* array;
  Touch* touches;
};

// Pointer into device or constant memory. Every parameter has a type of its own (`Which`): a kernel may not depend on
// which of the two address spaces an input comes in, as MLX passes fewer than eight elements in constant memory.
template <typename T, int Which>
struct In {
  Memory* memory;
  int64_t at;
  EMU_CALLED T operator[](int64_t i) const {
    const int64_t k = at + i;
    Array& a = *memory->array;
    if (k < a.lowest || k >= a.highest) fail("%s[%ld] is outside [%ld, %ld)", a.name, k, a.lowest, a.highest);
    ++a.loads;
    touch_read(memory->touches[k - a.lowest], a.name, k, engine.device_epoch, &a);
    return ((const T*)a.data)[k];
  }
  T operator*() const { return (*this)[0]; }
  In operator+(int64_t i) const { return {memory, at + i}; }
  In& operator+=(int64_t i) {
    at += i;
    return *this;
  }
};

template <typename T>
struct Cell {
  Memory* memory;
  int64_t at;
  EMU_CALLED operator T() const {
    Array& a = *memory->array;
    ++a.loads;
    touch_read(memory->touches[at - a.lowest], a.name, at, engine.device_epoch, &a);
    return ((const T*)a.data)[at];
  }
  EMU_CALLED void operator=(T x) const {
    Array& a = *memory->array;
    ++a.stores;
    touch_write(memory->touches[at - a.lowest], a.name, at, engine.device_epoch, &a);
    ((T*)a.data)[at] = x;
  }
  void operator=(const Cell& other) const { *this = T(other); }
  void operator+=(T x) const { *this = T(float(T(*this)) + float(x)); }
};

template <typename T, int Which>
struct Out {
  Memory* memory;
  int64_t at;
  EMU_CALLED Cell<T> operator[](int64_t i) const {
    const int64_t k = at + i;
    const Array& a = *memory->array;
    if (k < a.lowest || k >= a.highest) fail("%s[%ld] is outside [%ld, %ld)", a.name, k, a.lowest, a.highest);
    return {memory, k};
  }
  Out operator+(int64_t i) const { return {memory, at + i}; }
  Out& operator+=(int64_t i) {
    at += i;
    return *this;
  }
};

template <typename T>
struct Numbers {  // a shape or strides
  const T* numbers;
  int rank;
  T operator[](int i) const {
    if (i < 0 || i >= rank) fail("%s: index %ld of %ld", "shape or strides", i, rank);
    return numbers[i];
  }
};

template <typename T, int Size>
struct Shared {
  static_assert(Size * sizeof(T) <= 32768, "more than 32 kB of threadgroup memory");
  T values[Size];
  Touch touches[Size];
  int group = -1;
  struct Place {
    Shared* shared;
    int at;
    EMU_CALLED operator T() const {
      if (shared->touches[at].write_group == 0) fail("%s[%ld] is read before it is written", "threadgroup memory", at);
      touch_read(shared->touches[at], "threadgroup memory", at, engine.shared_epoch, nullptr);
      return shared->values[at];
    }
    EMU_CALLED void operator=(T x) const {
      touch_write(shared->touches[at], "threadgroup memory", at, engine.shared_epoch, nullptr);
      shared->values[at] = x;
    }
    void operator=(const Place& other) const { *this = T(other); }
    void operator+=(T x) const { *this = T(*this) + x; }
  };
  EMU_CALLED Place operator[](int i) {
    if (i < 0 || i >= Size) fail("%s[%ld] is outside [0, %ld)", "threadgroup memory", i, Size);
    if (group != engine.group) {
      for (Touch& t : touches) t = {};
      group = engine.group;
    }
    return {this, i};
  }
};

enum Kind { SHUFFLE, XOR, UP, DOWN, BROADCAST, SUM, PREFIX };

// Shows `x` to the simdgroup and comes back once all of its lanes have: the values of all of them.
template <typename T>
EMU_CALLED static const uint64_t* meet(T x, Kind kind, int line) {
  static_assert(sizeof(T) <= 8, "");
  Fiber& f = engine.fibers[engine.current];
  uint64_t* slots = engine.slots[f.simd_count++ & 1];
  slots[engine.current] = 0;
  memcpy(&slots[engine.current], &x, sizeof x);
  f.state = AT_SIMD;
  f.line = line;
  f.kind = kind;
  to_scheduler(f);
  return slots + engine.current / LANES * LANES;
}

template <typename T>
static T value_of(const uint64_t* slots, int lane) {
  const int first = engine.current / LANES * LANES;
  if (lane < 0 || lane >= LANES || first + lane >= engine.threads)
    fail("%s: lane %ld reads from lane %ld, which does not exist", "simdgroup", engine.current % LANES, lane);
  T x;
  memcpy(&x, &slots[lane], sizeof x);
  return x;
}

static int lanes_here() {
  const int first = engine.current / LANES * LANES;
  return engine.threads - first < LANES ? engine.threads - first : LANES;
}

}  // namespace emu

namespace metal {

using ::bfloat;
using ::half;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emu::Fiber& f = emu::engine.fibers[emu::engine.current];
  f.state = emu::AT_BARRIER;
  f.line = line;
  f.flags = int(flags);
  emu::to_scheduler(f);
}

template <typename T>
T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  return emu::value_of<T>(emu::meet(x, emu::SHUFFLE, line), lane);
}

template <typename T>
T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return emu::value_of<T>(emu::meet(x, emu::BROADCAST, line), lane);
}

template <typename T>
T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  const int lane = emu::engine.current % emu::LANES;
  return emu::value_of<T>(emu::meet(x, emu::XOR, line), lane ^ mask);
}

// Lanes below `delta` have nothing to read: a NaN here, so that nobody builds on what one GPU gives them.
inline float simd_shuffle_up(float x, ushort delta, int line = __builtin_LINE()) {
  const int lane = emu::engine.current % emu::LANES;
  const uint64_t* slots = emu::meet(x, emu::UP, line);
  return lane < delta ? NAN : emu::value_of<float>(slots, lane - delta);
}

inline float simd_shuffle_down(float x, ushort delta, int line = __builtin_LINE()) {
  const int lane = emu::engine.current % emu::LANES;
  const uint64_t* slots = emu::meet(x, emu::DOWN, line);
  return lane + delta >= emu::lanes_here() ? NAN : emu::value_of<float>(slots, lane + delta);
}

inline float simd_sum(float x, int line = __builtin_LINE()) {
  const uint64_t* slots = emu::meet(x, emu::SUM, line);
  float values[emu::LANES] = {};
  for (int i = 0; i < emu::lanes_here(); ++i) values[i] = emu::value_of<float>(slots, i);
  for (int step = emu::LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) values[i] += values[i + step];
  return values[0];
}

inline float simd_prefix_inclusive_sum(float x, int line = __builtin_LINE()) {
  const uint64_t* slots = emu::meet(x, emu::PREFIX, line);
  float sum = 0;
  for (int i = 0; i <= emu::engine.current % emu::LANES; ++i) sum += emu::value_of<float>(slots, i);
  return sum;
}

// `y` moved by some units in the last place, as a GPU's functions are off; how many follows from the argument.
inline float off(float x, float y) {
  const int most = emu::engine.call->ulps;
  const uint32_t bits = emu::bits_of(y), exponent = bits >> 23 & 255;
  if (!most || exponent < 2 || exponent > 253) return y;
  return emu::float_of(bits + int((emu::bits_of(x) * 2654435761u >> 16) % (2 * most + 1)) - most);
}

inline float exp(float x) {
  ++emu::engine.call->exps;
  return off(x, ::expf(x));
}
inline float exp2(float x) {
  ++emu::engine.call->exps;
  return off(x, ::exp2f(x));
}
inline float log(float x) {
  ++emu::engine.call->logs;
  return off(x, ::logf(x));
}
inline float abs(float x) { return ::fabsf(x); }
inline float max(float a, float b) { return ::fmaxf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

}  // namespace metal

using namespace metal;

namespace emu {

struct Position {
  uint3 threadgroup_position_in_grid, thread_position_in_grid, thread_position_in_threadgroup;
  uint3 threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, threads_per_simdgroup;
};

// Every threadgroup of the launch, one after the other. `body(position, memories)` is the kernel of one thread.
template <typename Body>
int launch(Call* call, int arrays, Body body) {
  Memory* memories = new Memory[arrays];
  for (int i = 0; i < arrays; ++i)
    memories[i] = {&call->arrays[i],
                   (Touch*)calloc(call->arrays[i].highest - call->arrays[i].lowest + 1, sizeof(Touch))};
  if (!engine.stacks)
    engine.stacks = (char*)mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  engine.call = call;
  engine.failed = false;
  engine.group = -1;
  struct Data {
    Body* body;
    Memory* memories;
    Position position;
  } data = {&body, memories, {}};
  engine.body_data = &data;
  engine.body = [](void* p, int i) {
    Data& d = *(Data*)p;
    Position q = d.position;
    const uint w = q.threads_per_threadgroup.x, h = q.threads_per_threadgroup.y;
    q.thread_position_in_threadgroup = {uint(i) % w, uint(i) / w % h, uint(i) / w / h};
    q.thread_position_in_grid = {q.threadgroup_position_in_grid.x * w + q.thread_position_in_threadgroup.x,
                                 q.threadgroup_position_in_grid.y * h + q.thread_position_in_threadgroup.y,
                                 q.threadgroup_position_in_grid.z * q.threads_per_threadgroup.z +
                                     q.thread_position_in_threadgroup.z};
    q.thread_index_in_threadgroup = i;
    q.thread_index_in_simdgroup = i % LANES;
    q.simdgroup_index_in_threadgroup = i / LANES;
    (*d.body)(q, d.memories);
  };
  const int* g = call->group;
  const uint n[3] = {uint(call->grid[0] / g[0]), uint(call->grid[1] / g[1]), uint(call->grid[2] / g[2])};
  Position& p = data.position;
  p.threads_per_threadgroup = {uint(g[0]), uint(g[1]), uint(g[2])};
  p.threads_per_grid = {uint(call->grid[0]), uint(call->grid[1]), uint(call->grid[2])};
  p.threadgroups_per_grid = {n[0], n[1], n[2]};
  const int threads = g[0] * g[1] * g[2];
  p.simdgroups_per_threadgroup = (threads + LANES - 1) / LANES;
  p.threads_per_simdgroup = LANES;
  // Function-local statics of the kernel remember the last threadgroup they belonged to: no number is used twice.
  static int groups_so_far = 0;
  try {
    for (uint z = 0; z < n[2]; ++z)
      for (uint y = 0; y < n[1]; ++y)
        for (uint x = 0; x < n[0]; ++x) {
          if (call->most_columns && int(x) >= call->most_columns) break;
          engine.group = ++groups_so_far;
          p.threadgroup_position_in_grid = {x, y, z};
          run_group(threads);
          if (engine.failed) throw engine.error;
        }
  } catch (Error& e) {
    snprintf(call->error, sizeof call->error, "threadgroup (%u, %u, %u): %s", p.threadgroup_position_in_grid.x,
             p.threadgroup_position_in_grid.y, p.threadgroup_position_in_grid.z, e.text);
  }
  for (int i = 0; i < arrays; ++i) free(memories[i].touches);
  delete[] memories;
  return call->error[0] != 0;
}

}  // namespace emu
