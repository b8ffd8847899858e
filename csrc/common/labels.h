// Which keys have a label, by columns of labels. Not inline, see tensor.h.
#pragma once

#include <cstdint>

namespace fastlvm {

class LabelIndex {
 public:
  struct Range {
    const int64_t *begin, *end;  // keys, ascending
  };

  // labels [keys, columns], contiguous; none of them is read if `labels` is null
  LabelIndex(const int64_t* labels, int64_t keys, int64_t columns);
  LabelIndex(const LabelIndex&) = delete;
  LabelIndex& operator=(const LabelIndex&) = delete;
  ~LabelIndex();

  // The keys with this label in this column; none for a negative label.
  Range find(int64_t column, int64_t label) const;

 private:
  int64_t keys_;
  int64_t *sorted_ = nullptr, *labels_ = nullptr;  // [columns, keys], each column by its labels
};

}  // namespace fastlvm
