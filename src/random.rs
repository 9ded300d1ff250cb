//! Philox4x32-10 (Salmon et al. 2011): random bits as a pure function of a counter and a key, so that there is no state to save.
//!
//! Every draw of the engine (dropout, shuffling, initialisation) comes from here, on every device alike.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// What a draw is for; the last counter word, so that two uses of one seed never share bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// LoRA dropout masks.
    Dropout = 1,
    /// Order of the data.
    Shuffle = 2,
    /// Initial adapter weights.
    Init = 3,
    /// Held-out split.
    Split = 4,
    /// Data made for tests and benchmarks.
    Synthetic = 5,
    /// Stochastic rounding of parameters.
    Rounding = 6,
}

/// Ten rounds of Philox4x32: four random words for `counter` under `key`.
#[inline]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let high = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        let (low_hi, low_lo) = ((low >> 32) as u32, (low & 0xFFFF_FFFF) as u32);
        let (high_hi, high_lo) = ((high >> 32) as u32, (high & 0xFFFF_FFFF) as u32);
        counter = [
            high_hi ^ counter[1] ^ key[0],
            high_lo,
            low_hi ^ counter[3] ^ key[1],
            low_lo,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The two key words of a seed.
#[inline]
pub fn key(seed: u64) -> [u32; 2] {
    [(seed & 0xFFFF_FFFF) as u32, (seed >> 32) as u32]
}

/// A sequence of draws for host-side use: one stream, one 64-bit subsequence.
#[derive(Debug, Clone)]
pub struct Draws {
    key: [u32; 2],
    subsequence: u64,
    stream: Stream,
    index: u32,
    buffer: [u32; 4],
}

impl Draws {
    /// Draws number 0, 1, 2, ... of `subsequence` in `stream` under `seed`.
    pub fn new(seed: u64, stream: Stream, subsequence: u64) -> Self {
        Self {
            key: key(seed),
            subsequence,
            stream,
            index: 0,
            buffer: [0; 4],
        }
    }

    /// Next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        let lane = (self.index % 4) as usize;
        if lane == 0 {
            let [low, high] = key(self.subsequence);
            self.buffer = philox4x32([self.index / 4, low, high, self.stream as u32], self.key);
        }
        self.index += 1;
        self.buffer[lane]
    }

    /// Uniform in `[0, 1)`, 24 bits.
    pub fn next_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Standard normal (Box-Muller on two draws).
    pub fn next_normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.next_f32()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.next_f32()).cos()
    }

    /// Uniform integer below `bound`, without modulo bias beyond 2^-32.
    pub fn below(&mut self, bound: usize) -> usize {
        let product = u64::from(self.next_u32()) * bound as u64;
        (product >> 32) as usize
    }

    /// Fisher-Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_known_answers_of_random123() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn shuffle_is_a_permutation_that_depends_on_the_subsequence() {
        let order = |epoch| {
            let mut items: Vec<usize> = (0..100).collect();
            Draws::new(42, Stream::Shuffle, epoch).shuffle(&mut items);
            items
        };
        assert_ne!(order(0), order(1));
        assert_eq!(order(1), order(1));
        let mut sorted = order(0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }
}
