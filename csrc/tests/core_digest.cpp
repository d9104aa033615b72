#include <set>
#include <vector>

#include "core/digest.h"
#include "tests/check.h"

using namespace draco;

// Rows and groups that vectors around every boundary have in their last block.
TEST(rows_and_groups_of_a_block) {
  for (int64_t groups = 1; groups <= kDigestRows * kDigestGroups; ++groups) {
    for (const int64_t bytes : {(groups - 1) * kDigestGroup + 1, groups * kDigestGroup}) {
      const int rows = digest_rows(bytes);
      int64_t total = 0;
      for (int i = 0; i < rows; ++i) {
        CHECK_EQ(digest_groups(bytes, i) >= 1, true, "bytes ", bytes, ", row ", i);
        total += digest_groups(bytes, i);
      }
      CHECK_EQ(total, groups, "bytes ", bytes);
      for (int i = rows; i < kDigestRows; ++i) CHECK_EQ(digest_groups(bytes, i) <= 0, true, "bytes ", bytes);
    }
  }
  CHECK_EQ(digest_rows(int64_t{1} << 50), kDigestRows);
  CHECK_EQ(digest_groups(int64_t{1} << 50, kDigestRows - 1), kDigestGroups);
}

// What the proof needs of the key: in a pair of words that is the last in which cells differ, no two cells use the same
// pair of the key; nor do the sums of one hash; and both parts of the key hold all of theirs.
TEST(pairs_of_the_key_are_apart) {
  for (int group : {0, kDigestGroups - 1}) {
    std::set<int> lines;
    for (int cell = 0; cell < kDigestCells; ++cell) lines.insert(cell + group);
    CHECK_EQ(lines.size(), static_cast<size_t>(kDigestCells), "group ", group);
    CHECK_LE((*lines.rbegin() + 1) * kDigestLineWords, kDigestCellKey, "group ", group);
  }
  std::vector<uint32_t> key(kDigestKey);
  for (int i = 0; i < kDigestKey / 4; ++i)
    for (int w = 0; w < 4; ++w) key[4 * i + w] = digest_key(7, i).word[w];
  for (int cell : {0, 1, kDigestCells - 1}) {
    std::set<uint64_t> products;
    for (int i = 0; i < kDigestSums; ++i) {
      const int at = kDigestCellKey + 2 * cell + kDigestShift * i;
      CHECK_LE(at + 2, kDigestKey, "cell ", cell, ", sum ", i);
      const uint64_t hash = 0x0123456789abcdef;
      const uint64_t wanted = uint64_t{0x89abcdefu + key[at]} * uint64_t{0x01234567u + key[at + 1]};
      CHECK_EQ(digest_cell(key.data(), cell, i, hash), wanted, "cell ", cell, ", sum ", i);
      products.insert(wanted);
    }
    CHECK_EQ(products.size(), static_cast<size_t>(kDigestSums), "cell ", cell);
  }
}

// Carter and Wegman: the upper half of what a block adds differs for halves that differ, in both.
TEST(weights_of_blocks) {
  std::set<uint64_t> words;
  for (int64_t block : {int64_t{0}, int64_t{1}, int64_t{1} << 33, kDigestLength})
    for (int i = 0; i < kDigestSums; ++i)
      for (const uint64_t sum : {uint64_t{1}, uint64_t{2}, uint64_t{1} << 32, uint64_t{1} << 63})
        words.insert(digest_weigh(3, block, i, sum) >> 32);
  CHECK_EQ(words.size(), size_t{4 * 4 * kDigestSums});
  CHECK_EQ(digest_weigh(3, 5, 1, 0), uint64_t{0});
}

int main() { return check::run(); }
