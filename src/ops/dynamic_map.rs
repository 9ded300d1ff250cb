//! How 8-bit moments are coded: the nearest value of a dynamic map to what is in `[-1, 1]`, by two look-ups.

use std::sync::LazyLock;

use crate::store::nf4::dynamic;

/// Cells that magnitudes fall into: their upper 16 bits, from 2^-23, below which all is 0, up to 1. A cell holds at most one border
/// between two values of a map.
pub const NUM_CELLS: usize = 2945;
/// Upper 16 bits of 2^-23.
pub const FIRST_CELL: u32 = 104 << 7;

/// A dynamic map, and what finds its nearest value. The rank of a magnitude counts the map's magnitudes from 0; rank `r` stands
/// for `border[r - 1] < magnitude <= border[r]`.
#[derive(Debug)]
pub struct DynamicMap {
    /// Value of each code.
    pub code: &'static [f32; 256],
    /// Upper border of each rank.
    pub border: [f32; 256],
    /// Rank of each cell's lower end.
    pub cell: [u8; NUM_CELLS],
    /// Code of 0.
    zero: u8,
}

/// For first moments.
pub static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(&dynamic::CODE, 127));
/// For second moments.
pub static UNSIGNED: LazyLock<DynamicMap> =
    LazyLock::new(|| DynamicMap::new(&dynamic::UNSIGNED_CODE, 0));

impl DynamicMap {
    fn new(code: &'static [f32; 256], zero: u8) -> Self {
        let mut border = [f32::INFINITY; 256];
        let magnitudes = code[usize::from(zero)..].windows(2);
        for (border, pair) in border.iter_mut().zip(magnitudes) {
            *border = 0.5 * (pair[0] + pair[1]);
        }
        let mut map = Self {
            code,
            border,
            cell: [0; NUM_CELLS],
            zero,
        };
        map.cell = std::array::from_fn(|cell| {
            let low = (FIRST_CELL + u32::try_from(cell).unwrap_or(0)) << 16;
            map.rank_by_search(f32::from_bits(low))
        });
        map
    }

    /// Borders below `magnitude`.
    fn rank_by_search(&self, magnitude: f32) -> u8 {
        let rank = self.border.partition_point(|border| *border < magnitude);
        u8::try_from(rank).unwrap_or(u8::MAX)
    }

    fn rank(&self, magnitude: f32) -> u8 {
        let cell = (magnitude.to_bits() >> 16).saturating_sub(FIRST_CELL) as usize;
        let rank = self.cell[cell.min(NUM_CELLS - 1)];
        rank + u8::from(magnitude > self.border[usize::from(rank)])
    }

    /// Code of the value nearest to `ratio`; of two that are equally near, the one nearer to 0. Of the unsigned map, whose
    /// values divide, what is above 0 does not become 0.
    pub fn nearest(&self, ratio: f32) -> u8 {
        let rank = self.rank(ratio.abs());
        if self.zero == 0 {
            rank.max(u8::from(ratio > 0.0))
        } else if ratio < 0.0 {
            self.zero - rank.min(self.zero)
        } else {
            self.zero + rank
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_is_that_of_a_search_at_every_border_and_in_every_cell() {
        for map in [&*SIGNED, &*UNSIGNED] {
            let mut magnitudes = vec![0.0, 1.0, 1.0_f32.next_up(), f32::MIN_POSITIVE, 1e-7];
            let finite = map.border.iter().filter(|border| border.is_finite());
            for at in map.code.iter().chain(finite) {
                magnitudes.extend([at.next_down(), *at, at.next_up()].map(f32::abs));
            }
            for cell in FIRST_CELL..FIRST_CELL + 2944 {
                let low = cell << 16;
                magnitudes.extend([low, low + 1, low + 0x8000, low + 0xFFFF].map(f32::from_bits));
            }
            for magnitude in magnitudes {
                assert_eq!(
                    map.rank(magnitude),
                    map.rank_by_search(magnitude),
                    "{magnitude}"
                );
            }
        }
    }

    #[test]
    fn codes_read_back_to_themselves() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for (code, value) in (0..=255).zip(map.code) {
                assert_eq!(map.nearest(*value), code);
            }
            assert!(map.code.is_sorted());
        }
        assert_eq!([SIGNED.nearest(-1.0), SIGNED.nearest(0.0)], [0, 127]);
        assert_eq!([UNSIGNED.nearest(1e-12), UNSIGNED.nearest(0.0)], [1, 0]);
    }
}
