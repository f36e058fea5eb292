#include "tests/simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(HYBRID_THREAD_SANITIZER)  // this file itself is not instrumented: see CMakeLists.txt
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;  // reserved; the pages that are touched cost memory

Fiber* running = nullptr;

#if defined(__x86_64__)

// Saves the callee's registers and the stack pointer in *from, and continues where `to` was saved.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .text
  .globl simt_switch
  .type simt_switch, @function
simt_switch:
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
  .size simt_switch, .-simt_switch
)");

// A stack that looks as if simt_switch had been called just before entry.
void* new_context(std::byte* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where entry would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

#else

void simt_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
void* new_context(std::byte* stack, void (*entry)()) {  // kept at the foot of the stack that it describes
  auto* context = new (stack) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

// The stack that resume() was called on.
struct Outside {
  void* context = nullptr;
  void* sanitizer = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
} outside;

// Around a switch: AddressSanitizer needs the bounds of the stack to come, ThreadSanitizer the fiber.
#if defined(__SANITIZE_ADDRESS__)
void leave(void** saved, const void* bottom, size_t bytes, void*) {
  __sanitizer_start_switch_fiber(saved, bottom, bytes);
}
void arrive(void* saved, const void** bottom, size_t* bytes) { __sanitizer_finish_switch_fiber(saved, bottom, bytes); }
#elif defined(HYBRID_THREAD_SANITIZER)
void leave(void**, const void*, size_t, void* to) { __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync); }
void arrive(void*, const void**, size_t*) {}
#else
void leave(void**, const void*, size_t, void*) {}
void arrive(void*, const void**, size_t*) {}
#endif

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<std::byte*>(memory);
  context_ = new_context(stack_, main_loop);
#if defined(HYBRID_THREAD_SANITIZER)
  sanitizer_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(HYBRID_THREAD_SANITIZER)
  __tsan_destroy_fiber(sanitizer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // frames that never returned
#endif
  munmap(stack_, kStackBytes);
}

void Fiber::start(std::function<void()> job) {
  job_ = std::move(job);
  finished_ = false;
}

void Fiber::resume() {
  running = this;
#if defined(HYBRID_THREAD_SANITIZER)
  outside.sanitizer = __tsan_get_current_fiber();
#endif
  leave(&outside.sanitizer, stack_, kStackBytes, sanitizer_);
  simt_switch(&outside.context, context_);
  arrive(outside.sanitizer, nullptr, nullptr);
}

void Fiber::suspend() {
  Fiber* self = running;
  leave(&self->sanitizer_, outside.bottom, outside.bytes, outside.sanitizer);
  simt_switch(&self->context_, outside.context);
  arrive(self->sanitizer_, &outside.bottom, &outside.bytes);
}

void Fiber::main_loop() {
  arrive(nullptr, &outside.bottom, &outside.bytes);
  for (;;) {
    Fiber* self = running;
    self->job_();
    self->finished_ = true;
    suspend();
  }
}

#if defined(HYBRID_THREAD_SANITIZER)
void release(void* object) { __tsan_release(object); }
void acquire(void* object) { __tsan_acquire(object); }
#else
void release(void*) {}
void acquire(void*) {}
#endif

}  // namespace simt
