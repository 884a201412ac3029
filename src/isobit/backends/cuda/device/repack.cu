// From the file's rows of blocks to tiles of 8 rows by one superblock (layout.py, tiles.cuh).
#include "common.cuh"

// A tile a block (grid-stride): 16-byte chunk c of row r goes to chunk 8c + r; what is left of each
// row's superblock (Q6_K: d) follows, row by row. super_bytes: of one row's.
KERNEL(THREADS) repack(const uint16* raw, int64 tiles, int supers, int super_bytes, uint16* out) {
    int words = super_bytes / 2, chunked = super_bytes / 16 * 8, tail = words - chunked;
    for (int64 weight_tile = blockIdx.x; weight_tile < tiles; weight_tile += gridDim.x) {
        int64 group = weight_tile / supers, super = weight_tile % supers;
        for (int i = threadIdx.x; i < 8 * words; i += THREADS) {
            int row, word;  // of the source
            if (i < 8 * chunked) {
                row = i / 8 % 8;
                word = i / 64 * 8 + i % 8;
            } else {
                row = (i - 8 * chunked) / tail;
                word = chunked + (i - 8 * chunked) % tail;
            }
            out[weight_tile * 8 * words + i] = raw[((group * 8 + row) * supers + super) * words + word];
        }
    }
}
