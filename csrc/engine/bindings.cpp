// The Python side of generation: tensors become pointers here and nowhere else.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <variant>

#include "engine/decode_program.h"
#include "engine/engine.h"
#include "linear/weight_tensor.h"

namespace py = pybind11;

namespace hybrid {
namespace {

template <typename T>
T field(const py::dict& dict, const char* name) {
  if (!dict.contains(name)) throw py::value_error(std::string("DecodeProgram: spec has no field '") + name + "'");
  return dict[name].cast<T>();
}

template <typename Enum>
Enum choice(const py::dict& dict, const char* name, std::initializer_list<std::pair<const char*, Enum>> values) {
  const auto got = field<std::string>(dict, name);
  std::string allowed;
  for (const auto& [text, value] : values) {
    if (got == text) return value;
    allowed += std::string(allowed.empty() ? "" : ", ") + text;
  }
  throw py::value_error(std::string("DecodeProgram: spec field '") + name + "' must be one of " + allowed + "; got '" +
                        got + "'");
}

DecoderSpec spec_from_dict(const py::dict& dict) {
  DecoderSpec spec;
  spec.vocab_size = field<int64_t>(dict, "vocab_size");
  spec.hidden_size = field<int64_t>(dict, "hidden_size");
  spec.embed_dim = field<int64_t>(dict, "embed_dim");
  spec.num_layers = field<int64_t>(dict, "num_layers");
  spec.heads = field<int64_t>(dict, "heads");
  spec.kv_heads = field<int64_t>(dict, "kv_heads");
  spec.head_dim = field<int64_t>(dict, "head_dim");
  spec.intermediate_size = field<int64_t>(dict, "intermediate_size");
  spec.max_positions = field<int64_t>(dict, "max_positions");
  spec.norm = choice<NormKind>(dict, "norm", {{"rms_norm", NormKind::kRms}, {"layer_norm", NormKind::kLayer}});
  spec.norm_eps = static_cast<float>(field<double>(dict, "norm_eps"));
  spec.post_norm = choice<bool>(dict, "norm_position", {{"pre", false}, {"post", true}});
  spec.final_norm = field<bool>(dict, "final_norm");
  spec.positions = choice<PositionKind>(
      dict, "positions",
      {{"rotary", PositionKind::kRotary}, {"learned", PositionKind::kLearned}, {"alibi", PositionKind::kAlibi}});
  spec.position_offset = field<int64_t>(dict, "position_offset");
  if (spec.positions == PositionKind::kRotary) {
    spec.rotary_dim = field<int64_t>(field<py::dict>(dict, "rope"), "rotary_dim");
  }
  spec.activation = parse_activation(field<std::string>(dict, "activation"));
  spec.gated_mlp = field<bool>(dict, "gated_mlp");
  spec.qk_norm = field<bool>(dict, "qk_norm");
  spec.tied_head = field<bool>(dict, "tied_head");
  spec.attention_scale = static_cast<float>(field<double>(dict, "attention_scale"));
  spec.sliding_window = field<int64_t>(dict, "sliding_window");
  return spec;
}

Slices slices_from_dict(const py::dict& dict) {
  const auto begins = [&](const char* name) { return field<std::vector<int64_t>>(dict, name); };
  return {field<int64_t>(dict, "rank"), begins("heads"), begins("intermediate"), begins("hidden"), begins("embed"),
          begins("vocab")};
}

// A parameter, or the parts of it that a rank reads, one after another.
using Pieces = std::variant<at::Tensor, std::vector<at::Tensor>>;

std::vector<at::Tensor> pieces_of(Pieces pieces) {
  if (auto* whole = std::get_if<at::Tensor>(&pieces)) return {*whole};
  return std::get<std::vector<at::Tensor>>(std::move(pieces));
}

void append(const std::string& name, const at::Tensor& tensor, TensorView& view) {
  const auto expect = [&](bool ok, const char* expected, const std::string& got) {
    if (!ok) throw py::value_error("bind: parameter '" + name + "' expected " + expected + ", got " + got);
  };
  expect(tensor.device().is_cpu(), "a CPU tensor", tensor.device().str());
  expect(tensor.scalar_type() == weight_type(tensor), "float32 or bfloat16", c10::toString(tensor.scalar_type()));
  expect(tensor.is_contiguous(), "a contiguous tensor", "one with other strides");
  const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
  if (view.pieces.empty()) {
    view.shape = tensor.sizes().vec();
  } else {
    expect(tensor.dim() > 0 && tensor.sizes().slice(1) == c10::IntArrayRef(view.shape).slice(1),
           "pieces that differ in their first size alone", "others");
    view.shape[0] += rows;
  }
  view.pieces.push_back({weight_of(tensor), rows});
}

TensorView view_of(const std::string& name, const std::vector<at::Tensor>& pieces) {
  if (pieces.empty()) throw py::value_error("bind: parameter '" + name + "' has no pieces");
  TensorView view;
  for (const at::Tensor& piece : pieces) append(name, piece, view);
  return view;
}

// One value a token, all responses end to end.
template <typename T>
at::Tensor flatten(const std::vector<Response>& responses, std::vector<T> Response::* values, at::ScalarType dtype) {
  int64_t size = 0;
  for (const Response& response : responses) size += static_cast<int64_t>((response.*values).size());
  at::Tensor flat = at::empty({size}, dtype);
  T* out = flat.mutable_data_ptr<T>();
  for (const Response& response : responses) out = std::copy((response.*values).begin(), (response.*values).end(), out);
  return flat;
}

at::Tensor offsets_of(const std::vector<Response>& responses) {
  at::Tensor offsets = at::empty({static_cast<int64_t>(responses.size()) + 1}, at::kLong);
  int64_t* out = offsets.mutable_data_ptr<int64_t>();
  *out = 0;
  for (const Response& response : responses) {
    const int64_t end = *out + static_cast<int64_t>(response.tokens.size());
    *++out = end;
  }
  return offsets;
}

py::dict counters_to_dict(const GenerateCounters& counters) {
  using namespace py::literals;
  return py::dict("passes"_a = counters.passes, "prefill_passes"_a = counters.prefill_passes,
                  "decode_steps"_a = counters.decode_steps, "prefill_tokens"_a = counters.prefill_tokens,
                  "recomputed_tokens"_a = counters.recomputed_tokens, "decode_tokens"_a = counters.decode_tokens,
                  "draft_tokens"_a = counters.draft_tokens, "draft_accepted"_a = counters.draft_accepted,
                  "preemptions"_a = counters.preemptions, "prefill_seconds"_a = counters.prefill_seconds,
                  "decode_seconds"_a = counters.decode_seconds, "sampling_seconds"_a = counters.sampling_seconds,
                  "block_bytes"_a = counters.block_bytes, "arena_blocks"_a = counters.arena_blocks,
                  "peak_blocks"_a = counters.peak_blocks, "scratch_bytes"_a = counters.scratch_bytes);
}

py::dict result_to_dict(const GenerateResult& result) {
  using namespace py::literals;
  const std::vector<Response>& responses = result.responses;
  py::list reasons;
  constexpr const char* kReasons[] = {"unfinished", "stop", "length"};
  for (const Response& response : responses) reasons.append(kReasons[static_cast<int>(response.reason)]);
  return py::dict("tokens"_a = flatten<int64_t>(responses, &Response::tokens, at::kLong),
                  "logprobs"_a = flatten<float>(responses, &Response::logprobs, at::kFloat),
                  "entropies"_a = flatten<float>(responses, &Response::entropies, at::kFloat),
                  "kept_mass"_a = flatten<float>(responses, &Response::kept_mass, at::kFloat),
                  "thresholds"_a = flatten<float>(responses, &Response::thresholds, at::kFloat),
                  "kept_logprobs"_a = flatten<float>(responses, &Response::kept_logprobs, at::kFloat),
                  "offsets"_a = offsets_of(responses), "finish_reasons"_a = reasons,
                  "counters"_a = counters_to_dict(result.counters));
}

// Runs between passes without the GIL. It takes the GIL to let Ctrl-C through and to report progress, but only so often
// that neither costs anything; and for every token where someone wants to see each of them.
class Heartbeat {
 public:
  Heartbeat(py::object on_progress, py::object on_token)
      : on_progress_(std::move(on_progress)), on_token_(std::move(on_token)) {}

  void operator()(const Progress& progress) {
    if (!on_token_.is_none()) {
      const py::gil_scoped_acquire gil;
      for (const DrawnToken& drawn : progress.drawn) on_token_(drawn.sample, drawn.token);
    }
    const auto now = Clock::now();
    if (now < next_beat_ && progress.done < progress.total) return;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!on_progress_.is_none()) on_progress_(progress.done, progress.total, progress.tokens);
    next_beat_ = Clock::now() + kBeat;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kBeat = std::chrono::milliseconds(50);
  py::object on_progress_, on_token_;
  Clock::time_point next_beat_{};
};

// Throws what interrupted the call. A Python exception gets what was done until then as its attribute `partial`.
[[noreturn]] void rethrow_with(const std::exception_ptr& interruption, const py::dict& partial) {
  try {
    std::rethrow_exception(interruption);
  } catch (py::error_already_set& error) {
    error.value().attr("partial") = partial;
    throw;
  } catch (const PeerLost& error) {
    py::set_error(PyExc_RuntimeError, error.what());
    py::error_already_set raised;
    raised.value().attr("partial") = partial;
    throw raised;
  }
}

// DecodeProgram with the tensors that its pointers belong to.
class BoundProgram {
 public:
  BoundProgram(DecoderSpec spec, Slices slices, std::shared_ptr<Peers> peers)
      : program_(std::move(spec), std::move(slices), std::move(peers)) {}

  void bind(std::map<std::string, Pieces> parameters, const std::map<std::string, float>& lora_scales,
            std::shared_ptr<WeightGate> gate) {
    refuse_while_running("bind");
    TensorTable table;
    std::map<std::string, std::vector<at::Tensor>> tensors;
    for (auto& [name, pieces] : parameters) {
      tensors[name] = pieces_of(std::move(pieces));
      table.emplace(name, view_of(name, tensors[name]));
    }
    program_.bind(resolve_weights(program_.spec(), program_.slices(), table, lora_scales), std::move(gate));
    tensors_ = std::move(tensors);
  }

  void unbind() {
    refuse_while_running("unbind");
    program_.unbind();
    tensors_.clear();
  }

  void release_cache() {
    refuse_while_running("release_cache");
    program_.release_cache();
  }

  std::map<std::string, uintptr_t> bound_pointers() const {
    std::map<std::string, uintptr_t> pointers;
    for (const auto& [name, pieces] : tensors_) {
      pointers[name] = reinterpret_cast<uintptr_t>(pieces.front().const_data_ptr());
    }
    return pointers;
  }

  py::dict declare(const std::vector<PromptRequest>& queue, const GenerateRequest& request, int64_t lora_columns) const {
    using namespace py::literals;
    const DeclaredMemory memory = program_.declare(queue, request, lora_columns);
    return py::dict("block_bytes"_a = memory.block_bytes, "blocks"_a = memory.blocks,
                    "scratch_bytes"_a = memory.scratch_bytes);
  }

  py::dict generate(GenerateRequest request, py::object on_progress, py::object on_token) {
    refuse_while_running("generate");
    struct Running {
      bool& flag;
      explicit Running(bool& running) : flag(running) { flag = true; }
      ~Running() { flag = false; }
    } running(running_);
    Heartbeat heartbeat(std::move(on_progress), std::move(on_token));
    GenerateResult result;
    {
      const py::gil_scoped_release no_gil;
      result = program_.generate(request, std::ref(heartbeat));
    }
    py::dict dict = result_to_dict(result);
    declare_memory(dict["counters"], result.counters);
    if (result.interruption) rethrow_with(result.interruption, dict);
    return dict;
  }

 private:
  // Everything that the rollout read and wrote, were it alone in the process.
  void declare_memory(const py::dict& counters, const GenerateCounters& counted) const {
    std::map<const void*, int64_t> storages;  // a tied head is there once
    for (const auto& [name, pieces] : tensors_) {
      for (const at::Tensor& piece : pieces) storages[piece.const_data_ptr()] = static_cast<int64_t>(piece.nbytes());
    }
    int64_t weights = 0;
    for (const auto& [pointer, bytes] : storages) weights += bytes;
    counters["weight_bytes"] = weights;
    counters["declared_bytes"] = weights + counted.peak_blocks * counted.block_bytes + counted.scratch_bytes;
  }

  void refuse_while_running(const char* what) const {
    if (running_) throw std::runtime_error(std::string("DecodeProgram.") + what + ": generate() is running");
  }

  DecodeProgram program_;
  std::map<std::string, std::vector<at::Tensor>> tensors_;
  bool running_ = false;
};

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void register_gate(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;  // a thread that waits may hold the lock and want the GIL
  py::class_<WeightGate, std::shared_ptr<WeightGate>>(m, "WeightGate", "Weights that arrive while they are in use.")
      .def(py::init([](std::set<int64_t> streamed) {
             return std::make_shared<WeightGate>(check_signals, std::move(streamed));
           }),
           py::arg("streamed") = std::set<int64_t>{}, "Parts that come anew for every pass: see csrc/engine/weight_gate.h.")
      .def("open", &WeightGate::open, py::arg("part"), no_gil, "Part 0, 1, ... is there.")
      .def("await_release", &WeightGate::await_release, py::arg("part"), no_gil,
           "Returns when a streamed part is read no more.")
      .def("reader", &WeightGate::reader, py::arg("patience"), no_gil,
           "The rollout in progress, or 0; waits for the first one up to so many seconds.")
      .def("begin_round", &WeightGate::begin_round, py::arg("rollout"), no_gil,
           "A round of the streamed parts begins, for a rollout, if it is still in progress.")
      .def("enter", &WeightGate::enter, py::arg("rollout"), no_gil, "A rollout begins.")
      .def("leave", &WeightGate::leave, no_gil, "It has ended.")
      .def_property_readonly("delivering", &WeightGate::delivering, "Whether a rollout reads the present round.")
      .def("fail", &WeightGate::fail, py::arg("why"), no_gil, "Whoever waits gets a RuntimeError that says why.")
      .def("wait", &WeightGate::wait, py::arg("part"), no_gil, "Returns when the part is there.")
      .def("close", &WeightGate::close, no_gil, "Nothing is there any more.")
      .def_property_readonly("waited_seconds", &WeightGate::waited_seconds, "Since it was last closed.");
}

// The shared memory with what keeps it mapped.
class SharedPeers : public Peers {
 public:
  SharedPeers(at::Tensor memory, int64_t rank, int64_t ranks, int64_t first_rank, double timeout)
      : Peers(checked(memory, ranks), rank, ranks, first_rank, timeout, check_signals), memory_(std::move(memory)) {}

 private:
  static std::byte* checked(const at::Tensor& memory, int64_t ranks) {
    if (memory.scalar_type() != at::kByte || !memory.is_contiguous() || memory.numel() != bytes_for(ranks)) {
      throw py::value_error("Peers: memory must be " + std::to_string(bytes_for(ranks)) + " contiguous bytes");
    }
    return static_cast<std::byte*>(memory.mutable_data_ptr());
  }
  at::Tensor memory_;
};

void register_peers(py::module_& m) {
  py::class_<SharedPeers, std::shared_ptr<SharedPeers>>(m, "Peers", "Ranks that generate together: csrc/common/peers.h.")
      .def(py::init<at::Tensor, int64_t, int64_t, int64_t, double>(), py::arg("memory"), py::arg("rank"),
           py::arg("ranks"), py::arg("first_rank"), py::arg("timeout"))
      .def_static("bytes_for", &SharedPeers::bytes_for, py::arg("ranks"), "Size of the memory that they share.")
      .def_property_readonly("position", &SharedPeers::position)
      .def("begin", &SharedPeers::begin, py::arg("position"))
      .def("leave", &SharedPeers::leave, "Ends the rollout for the ranks that wait for this one.");
}

void register_program(py::module_& m) {
  py::class_<BoundProgram>(m, "DecodeProgram", "Generates from a decoder's own parameters; see csrc/engine.")
      .def(py::init([](const py::dict& spec, const std::optional<py::dict>& slices, std::shared_ptr<SharedPeers> peers) {
             const DecoderSpec decoder = spec_from_dict(spec);
             const Slices parts = slices ? slices_from_dict(*slices) : Slices::whole(decoder);
             return std::make_unique<BoundProgram>(decoder, parts, std::move(peers));
           }),
           py::arg("spec"), py::arg("slices") = py::none(), py::arg("peers") = std::shared_ptr<SharedPeers>{})
      .def("bind", &BoundProgram::bind, py::arg("parameters"), py::arg("lora_scales") = std::map<std::string, float>{},
           py::arg("gate") = std::shared_ptr<WeightGate>{},
           "Takes the data pointers of float32 or bfloat16 CPU tensors, or of the row ranges that are this rank's; keeps "
           "them alive until unbind(). With a gate the "
           "contents may come later: generate() waits for each part.")
      .def("unbind", &BoundProgram::unbind)
      .def("bound_pointers", &BoundProgram::bound_pointers, "Data pointer of every bound tensor, by name.")
      .def("release_cache", &BoundProgram::release_cache, "Frees the KV cache that keep_cache=True kept.")
      .def(
          "declare",
          [](const BoundProgram& program, const std::vector<PromptRequest>& queue, int64_t max_batch, int64_t kv_bytes,
             int64_t top_k, float top_p, int64_t lora_columns) {
            GenerateRequest request;
            request.max_batch = max_batch;
            request.kv_bytes = kv_bytes;
            request.rule = {1, top_k, top_p, 0};
            return program.declare(queue, request, lora_columns);
          },
          py::arg("queue"), py::kw_only(), py::arg("max_batch"), py::arg("kv_bytes") = 0, py::arg("top_k") = 0,
          py::arg("top_p") = 1.0f, py::arg("lora_columns") = 0,
          "Bytes that a rollout of the queue would take besides the weights: block_bytes * blocks of the cache, and "
          "scratch_bytes. Nothing needs to be bound.")
      .def(
          "generate",
          [](BoundProgram& program, std::vector<std::vector<int64_t>> prompts, int64_t samples_per_prompt,
             int64_t max_new_tokens, std::vector<int64_t> prompt_max_new, float temperature, int64_t top_k, float top_p,
             uint64_t seed, std::vector<uint64_t> sample_ids, std::vector<int64_t> stop_tokens,
             std::vector<double> expected_new, std::vector<std::vector<int64_t>> drafts, int64_t max_batch,
             int64_t max_prefill_rows, int64_t kv_bytes, bool keep_cache, bool poison_freed_blocks,
             py::object on_progress, py::object on_token) {
            GenerateRequest request;
            request.prompts = std::move(prompts);
            request.rule = {temperature, top_k, top_p, seed};
            request.samples_per_prompt = samples_per_prompt;
            request.max_new_tokens = max_new_tokens;
            request.prompt_max_new = std::move(prompt_max_new);
            request.stop_tokens = std::move(stop_tokens);
            request.sample_ids = std::move(sample_ids);
            request.expected_new = std::move(expected_new);
            request.drafts = std::move(drafts);
            request.max_batch = max_batch;
            request.max_prefill_rows = max_prefill_rows;
            request.kv_bytes = kv_bytes;
            request.keep_cache = keep_cache;
            request.poison_freed_blocks = poison_freed_blocks;
            return program.generate(std::move(request), std::move(on_progress), std::move(on_token));
          },
          py::arg("prompts"), py::kw_only(), py::arg("samples_per_prompt"), py::arg("max_new_tokens"),
          py::arg("prompt_max_new") = std::vector<int64_t>{}, py::arg("temperature"), py::arg("top_k"),
          py::arg("top_p"), py::arg("seed"), py::arg("sample_ids"), py::arg("stop_tokens"),
          py::arg("expected_new") = std::vector<double>{}, py::arg("drafts") = std::vector<std::vector<int64_t>>{},
          py::arg("max_batch") = 64, py::arg("max_prefill_rows") = 512, py::arg("kv_bytes") = 0,
          py::arg("keep_cache") = false, py::arg("poison_freed_blocks") = false, py::arg("on_progress") = py::none(),
          py::arg("on_token") = py::none(),
          "Returns flat per-token tensors with offsets [samples + 1], finish_reasons and counters. An exception of a "
          "callback or of Ctrl-C has them as its attribute `partial`, with unfinished responses.");
}

void register_scheduler(py::module_& m) {
  py::class_<KvBlockPool>(m, "KvBlockPool")
      .def(py::init<int64_t>(), py::arg("size"))
      .def("allocate", &KvBlockPool::allocate)
      .def("retain", &KvBlockPool::retain)
      .def("release", &KvBlockPool::release)
      .def("references", &KvBlockPool::references)
      .def_property_readonly("available", &KvBlockPool::available)
      .def_property_readonly("used", &KvBlockPool::used)
      .def_property_readonly("peak_used", &KvBlockPool::peak_used);
  py::class_<PromptRequest>(m, "PromptRequest")
      .def(py::init<int64_t, int64_t, int64_t, double, std::vector<int64_t>>(), py::arg("prompt_length"),
           py::arg("max_new"), py::arg("samples"), py::arg("expected_new") = 0.0,
           py::arg("drafts") = std::vector<int64_t>{})
      .def_property_readonly("least_blocks", &Scheduler::least_blocks);
  py::class_<PassItem>(m, "PassItem")
      .def_readonly("prompt", &PassItem::prompt)
      .def_readonly("sample", &PassItem::sample)
      .def_readonly("start", &PassItem::start)
      .def_readonly("rows", &PassItem::rows)
      .def_readonly("first_draw", &PassItem::first_draw)
      .def_readonly("recomputed", &PassItem::recomputed)
      .def_property_readonly("blocks", [](const PassItem& item) { return *item.blocks; });
  py::class_<Outcome>(m, "Outcome")
      .def(py::init<int64_t, bool, bool>(), py::arg("tokens"), py::arg("finished"), py::arg("on_draft") = false);
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init([](std::vector<PromptRequest> queue, int64_t max_batch, int64_t max_prefill_rows, KvBlockPool& pool,
                       std::function<void(int32_t, int32_t)> copy, std::function<void(int32_t)> freed) {
             return std::make_unique<Scheduler>(std::move(queue), SchedulerLimits{max_batch, max_prefill_rows}, pool,
                                                BlockHooks{std::move(copy), std::move(freed)});
           }),
           py::arg("queue"), py::arg("max_batch"), py::arg("max_prefill_rows"), py::arg("pool"), py::arg("copy"),
           py::arg("freed"), py::keep_alive<1, 5>())
      .def("next_pass", &Scheduler::next_pass)
      .def("finish_pass", &Scheduler::finish_pass, py::arg("outcomes"))
      .def_property_readonly("done", &Scheduler::done)
      .def_property_readonly("slots_taken", &Scheduler::slots_taken)
      .def_property_readonly("preemptions", &Scheduler::preemptions)
      .def_static("enough_blocks", &Scheduler::enough_blocks, py::arg("queue"), py::arg("max_batch"));
}

}  // namespace

void register_engine(py::module_& m) {
  register_gate(m);
  register_peers(m);
  register_program(m);
  register_scheduler(m);
}

}  // namespace hybrid
