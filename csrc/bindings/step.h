// What the bindings of the one-token ops share: the state that is written, and which of its rows.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "bindings/bindings.h"

namespace fastlvm {

// Refuses a state of whose elements two may share a place: from the closest axis on, a stride has to reach past all
// that lies below it.
inline void check_apart(const Array& array) {
  const TensorView& view = array.view();
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return;
    if (view.shape[i] > 1) axes.emplace_back(std::abs(view.stride[i]), view.shape[i]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;  // from the first element to the last
  for (const auto& [stride, size] : axes) {
    if (stride <= reach)
      throw std::invalid_argument(std::string(array.name()) +
                                  ": got memory in which elements may overlap, wants a place for each; copy it first");
    reach += stride * (size - 1);
  }
}

// Which of `states` states each row advances; none given means that row i advances state i. Negative is padding.
inline std::vector<int64_t> read_state_indices(py::handle object, int64_t batch, const Array& state) {
  const int64_t states = state.shape(0);
  const auto fail = [](const std::string& text) { throw std::invalid_argument("state_indices: " + text); };
  const std::vector<int64_t> indices = read_integers("state_indices", object);
  if (object.is_none()) {
    if (states != batch)
      throw std::invalid_argument(std::string(state.name()) + ": got " + state.shape_text() + ", wants " +
                                  std::to_string(batch) + " states, one a row, without state_indices");
    return indices;
  }
  if (static_cast<int64_t>(indices.size()) != batch)
    fail("got " + std::to_string(indices.size()) + " elements, wants one for each of the " + std::to_string(batch) +
         " rows");
  std::vector<int64_t> used;
  for (const int64_t index : indices) {
    if (index >= states)
      fail("got " + std::to_string(index) + ", wants less than " + std::to_string(states) +
           ", the number of states, or a negative number for padding");
    if (index >= 0) used.push_back(index);
  }
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  if (twice != used.end()) fail("got " + std::to_string(*twice) + " twice, wants every state at most once");
  return indices;
}

// Null where row i advances state i.
inline const int64_t* pointer_to(const std::vector<int64_t>& indices) {
  return indices.empty() ? nullptr : indices.data();
}

inline void check_state(const Array& state, const char* axes, const Sizes& sizes, bool float64) {
  check_inputs({{state, axes}}, sizes, float64);
  check_apart(state);
}

// B or C as [b, G, N]: [b, N], or [b, G, N] with a G of its own that divides the channels.
inline TensorView check_groups(const Array& projection, Sizes sizes, int64_t channels, bool float64) {
  TensorView view = projection.view();
  if (view.rank == 2) {
    check_inputs({{projection, "BN"}}, sizes, float64);
    view.rank = 3;
    view.shape[2] = view.shape[1], view.stride[2] = view.stride[1];
    view.shape[1] = 1, view.stride[1] = 0;
    return view;
  }
  check_rank(projection, "BGN");
  const int64_t groups = sizes['G'] = projection.shape(1);
  check_inputs({{projection, "BGN"}}, sizes, float64);
  if (groups < 1 || channels % groups != 0)
    throw std::invalid_argument(std::string(projection.name()) + ": got " + std::to_string(groups) +
                                " groups, wants a number that divides the " + std::to_string(channels) + " channels");
  return view;
}

}  // namespace fastlvm
