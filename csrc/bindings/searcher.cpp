// _C.Searcher: the arrays of an inverted-list index, searched without the GIL; alone, or after a model in one call.
#include "search/searcher.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "bindings/bindings.h"
#include "predictor/model.h"

namespace fastlvm {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

// A contiguous array of one type and shape, kept alive; -1 stands for any size.
template <class T>
py::buffer_info contiguous(const char* name, py::handle object, std::initializer_list<int64_t> shape, bool writable) {
  if (!PyObject_CheckBuffer(object.ptr()))
    fail(std::string(name) + ": got " + Py_TYPE(object.ptr())->tp_name + ", wants an array");
  py::buffer_info found;
  try {
    found = py::reinterpret_borrow<py::buffer>(object).request(writable);
  } catch (const py::error_already_set& error) {
    fail(std::string(name) + ": " + std::string(py::str(error.value())));
  }
  std::string wanted, got;
  bool fits = found.item_type_is_equivalent_to<T>() && found.ndim == static_cast<py::ssize_t>(shape.size());
  size_t axis = 0;
  for (const int64_t size : shape) {
    if (fits && size >= 0 && found.shape[axis] != size) fits = false;
    wanted += (axis++ ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
  }
  for (const py::ssize_t size : found.shape) got += (got.empty() ? "" : ", ") + std::to_string(size);
  py::ssize_t stride = found.itemsize;
  for (py::ssize_t i = found.ndim; fits && i-- > 0; stride *= found.shape[static_cast<size_t>(i)])
    if (found.shape[static_cast<size_t>(i)] > 1 && found.strides[static_cast<size_t>(i)] != stride) fits = false;
  if (!fits)
    fail(std::string(name) + ": got " + found.format + " [" + got + "], wants contiguous " +
         py::format_descriptor<T>::format() + " [" + wanted + "]");
  return found;
}

// A Searcher and the arrays it reads.
class Holder {
 public:
  Holder(const py::dict& parts, int64_t tail_first) {
    ListsSource source{};
    const auto part = [&](const char* name) {
      if (!parts.contains(name)) fail(std::string(name) + " is missing");
      return py::handle(parts[name]);
    };
    const py::buffer_info codes = contiguous<int8_t>("codes", part("codes"), {-1, -1}, false);
    const py::buffer_info sizes = contiguous<int64_t>("sizes", part("sizes"), {-1}, false);
    source.rows = codes.shape[0], source.dim = codes.shape[1], source.nlist = sizes.shape[0];
    if (source.rows < 0 || source.rows > INT32_MAX || source.dim < 1 || source.dim > 1 << 16 || source.nlist < 1 ||
        source.nlist > 1 << 24)
      fail("codes: got " + std::to_string(source.rows) + " rows of " + std::to_string(source.dim) + " in " +
           std::to_string(source.nlist) + " lists, wants up to 2^31 of 1 to 65536 in 1 to 2^24");
    source.sizes = static_cast<const int64_t*>(sizes.ptr);
    int64_t blocks = 0;
    for (int64_t l = 0; l < source.nlist; ++l) {
      if (source.sizes[l] < 0 || source.sizes[l] > source.rows) fail("sizes: wants numbers of rows");
      blocks += (source.sizes[l] + block_rows - 1) / block_rows;
    }
    const int64_t columns = 2 * Searcher::pairs_of(source.dim);
    const auto hold = [&](auto*& to, const char* name, std::initializer_list<int64_t> shape) {
      using T = std::remove_const_t<std::remove_reference_t<decltype(*to)>>;
      arrays_.push_back(contiguous<T>(name, part(name), shape, false));
      to = static_cast<const T*>(arrays_.back().ptr);
    };
    hold(source.codes, "codes", {source.rows, source.dim});
    hold(source.sizes, "sizes", {source.nlist});
    hold(source.signs, "signs", {rotation_rounds, source.dim});
    hold(source.centroids, "centroids", {source.nlist, source.dim});
    hold(source.centroid_scales, "centroid_scales", {source.nlist});
    hold(source.level, "level", {1});
    hold(source.blocks, "blocks", {blocks, columns + static_cast<int64_t>(sizeof(float)), block_rows});
    hold(source.scales, "scales", {source.rows});
    hold(source.ids, "ids", {source.rows});
    const py::buffer_info tail = contiguous<int8_t>("tail_codes", part("tail_codes"), {-1, source.dim}, false);
    source.tail_room = tail.shape[0], source.tail_first = tail_first;
    if (tail_first < 0 || tail_first > INT32_MAX - source.tail_room || source.rows > INT32_MAX - source.tail_room)
      fail("tail_first: got " + std::to_string(tail_first) + ", wants ids below 2^31");
    hold(source.tail_codes, "tail_codes", {source.tail_room, source.dim});
    hold(source.tail_scales, "tail_scales", {source.tail_room});
    if (std::any_of(source.ids, source.ids + source.rows, [](int32_t id) { return id < 0; }))
      fail("ids: wants 0 or more");
    searcher_ = std::make_unique<Searcher>(source);
  }

  const Searcher& operator*() const { return *searcher_; }
  const Searcher* operator->() const { return searcher_.get(); }

 private:
  std::deque<py::buffer_info> arrays_;  // held, so that none moves
  std::unique_ptr<Searcher> searcher_;
};

// Where results go, and how they are found.
struct Results {
  Results(const Searcher& searcher, int64_t n, py::handle scores, py::handle ids, int64_t nprobe, int64_t candidates,
          py::handle excluded, int threads, int64_t tail) {
    const py::buffer_info found = contiguous<float>("scores", scores, {n, -1}, true);
    options.k = found.shape[1], to_scores = static_cast<float*>(found.ptr);
    if (options.k < 1) fail("scores: wants one column or more");
    to_ids = static_cast<int64_t*>(contiguous<int64_t>("ids", ids, {n, options.k}, true).ptr);
    if (nprobe < 1 || nprobe > searcher.nlist())
      fail("nprobe: got " + std::to_string(nprobe) + ", wants 1 to " + std::to_string(searcher.nlist()));
    if (candidates < 1) fail("candidates: got " + std::to_string(candidates) + ", wants 1 or more");
    options.nprobe = nprobe, options.candidates = candidates;
    if (!excluded.is_none()) {
      const py::buffer_info rows = contiguous<int64_t>("excluded", excluded, {n, -1}, false);
      options.excluded = static_cast<const int64_t*>(rows.ptr), options.excluded_count = rows.shape[1];
    }
    if (threads < 0 || threads > 1024) fail("threads: got " + std::to_string(threads) + ", wants 0 to 1024");
    options.threads = threads;
    if (tail < 0 || tail > searcher.tail_room())
      fail("tail: got " + std::to_string(tail) + ", wants 0 to " + std::to_string(searcher.tail_room()));
    options.tail = tail;
  }
  SearchOptions options{};
  float* to_scores;
  int64_t* to_ids;
};

void search(const Holder& searcher, py::handle queries, py::handle scores, py::handle ids, int64_t nprobe,
            int64_t candidates, py::handle excluded, int threads, int64_t tail) {
  const py::buffer_info given = contiguous<float>("queries", queries, {-1, searcher->dim()}, false);
  const Results to(*searcher, given.shape[0], scores, ids, nprobe, candidates, excluded, threads, tail);
  call_without_gil([&] {
    searcher->search(static_cast<const float*>(given.ptr), given.shape[0], to.options, to.to_scores, to.to_ids);
  });
}

void predict(const Holder& searcher, const Model& model, py::handle context, py::handle predicted, py::handle scores,
             py::handle ids, int64_t nprobe, int64_t candidates, py::handle excluded, int threads, int64_t tail,
             const Model* into_space, float own_score, float own_tie) {
  if (model.out_dim() != searcher->dim())
    fail("model: makes vectors of " + std::to_string(model.out_dim()) + ", and the index has " +
         std::to_string(searcher->dim()));
  const py::buffer_info given = contiguous<float>("context", context, {-1, model.positions(), model.dim()}, false);
  const int64_t n = given.shape[0];
  auto* const middle = static_cast<float*>(contiguous<float>("predicted", predicted, {n, searcher->dim()}, true).ptr);
  Results to(*searcher, n, scores, ids, nprobe, candidates, excluded, threads, tail);
  if (into_space &&
      (into_space->positions() != 1 || into_space->dim() != model.dim() || into_space->out_dim() != searcher->dim()))
    fail("into_space: wants a model of one vector like those of the context, into one like those of the index");
  call_without_gil([&] {
    const auto* const raw = static_cast<const float*>(given.ptr);
    std::vector<float> own;
    if (into_space) {
      own.resize(static_cast<size_t>(n * model.positions() * searcher->dim()));
      into_space->run(raw, n * model.positions(), own.data(), threads, nullptr);
      to.options.own = own.data(), to.options.own_count = model.positions();
      to.options.own_score = own_score, to.options.own_tie = own_tie;
    }
    model.run(raw, n, middle, threads, nullptr);
    searcher->search(middle, n, to.options, to.to_scores, to.to_ids);
  });
}

void rotate(py::handle signs, py::handle rows, bool back) {
  const py::buffer_info to = contiguous<float>("rows", rows, {-1, -1}, true);
  const int64_t dim = to.shape[1];
  if (dim < 1) fail("rows: wants one column or more");
  const auto* const given =
      static_cast<const float*>(contiguous<float>("signs", signs, {rotation_rounds, dim}, false).ptr);
  call_without_gil([&] {
    const Rotation rotation{dim, given, back};
    for (int64_t i = 0; i < to.shape[0]; ++i)
      active_kernels().search.rotate(rotation, static_cast<float*>(to.ptr) + i * dim);
  });
}

}  // namespace

void bind_searcher(py::module_& m) {
  py::class_<Holder>(m, "Searcher", "Inverted lists of RaBitQ and int8 codes: queries [n, dim] → scores, ids [n, k].")
      .def(py::init<py::dict, int64_t>(), py::arg("parts"), py::arg("tail_first"))
      .def("search", &search, py::arg("queries"), py::arg("scores"), py::arg("ids"), py::arg("nprobe"),
           py::arg("candidates"), py::arg("excluded") = py::none(), py::arg("threads") = 0, py::arg("tail") = 0)
      .def("predict", &predict, py::arg("model"), py::arg("context"), py::arg("predicted"), py::arg("scores"),
           py::arg("ids"), py::arg("nprobe"), py::arg("candidates"), py::arg("excluded") = py::none(),
           py::arg("threads") = 0, py::arg("tail") = 0, py::arg("into_space") = py::none(), py::arg("own_score") = 0.0f,
           py::arg("own_tie") = 0.0f);
  m.def("rotate", &rotate, py::arg("signs"), py::arg("rows"), py::arg("back") = false,
        "Rotate rows [n, dim] in place, or back; signs [rounds, dim].");
  m.attr("ROTATION_ROUNDS") = rotation_rounds;
  m.attr("BLOCK_ROWS") = block_rows;
}

}  // namespace fastlvm
