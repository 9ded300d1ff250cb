//! Units to optimizer steps: exactly `micro_batch_size` targets in a micro-batch, whatever their length.

use super::{Batch, IGNORE_INDEX, StepBatches, Unit};
use crate::random::{Draws, Stream};

/// How units become steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Targets in a micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches in a step.
    pub gradient_accumulation_steps: usize,
    /// Run the sequences of a micro-batch in one pass.
    pub sample_packing: bool,
    /// Order of each epoch; `None`: as they come.
    pub shuffle_seed: Option<u64>,
}

/// Consecutive targets of one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    unit: usize,
    first: usize,
    last: usize,
}

impl Packing {
    /// Optimizer steps in an epoch.
    pub fn steps_per_epoch(self, units: &[Unit]) -> usize {
        let targets: usize = units.iter().map(|unit| unit.target_ends.len()).sum();
        targets.div_ceil(self.micro_batch_size * self.gradient_accumulation_steps)
    }

    /// The steps of an epoch, in order.
    pub fn epoch(self, units: &[Unit], epoch: usize) -> Vec<StepBatches> {
        let micro_batches = self.windows(units, epoch);
        let steps = micro_batches.chunks(self.gradient_accumulation_steps);
        steps.map(|step| self.step(units, step)).collect()
    }

    /// Tokens of the longest pass in the first `num_epochs`.
    pub fn max_tokens(self, units: &[Unit], num_epochs: usize) -> usize {
        if !self.sample_packing {
            return units.iter().map(last_end).max().unwrap_or(0);
        }
        let epochs = if self.shuffle_seed.is_some() {
            num_epochs
        } else {
            1
        };
        let tokens = |window: &Window| units[window.unit].target_ends[window.last];
        let micro_batches = (0..epochs).flat_map(|epoch| self.windows(units, epoch));
        micro_batches
            .map(|windows| windows.iter().map(tokens).sum())
            .max()
            .unwrap_or(0)
    }

    /// The windows of each micro-batch of an epoch: units in order, cut where a micro-batch is full.
    fn windows(self, units: &[Unit], epoch: usize) -> Vec<Vec<Window>> {
        let mut order: Vec<usize> = (0..units.len()).collect();
        if let Some(seed) = self.shuffle_seed {
            Draws::new(seed, Stream::Shuffle, epoch as u64).shuffle(&mut order);
        }
        let mut micro_batches = vec![Vec::new()];
        let mut room = self.micro_batch_size;
        for unit in order {
            let count = units[unit].target_ends.len();
            let mut first = 0;
            while first < count {
                if room == 0 {
                    micro_batches.push(Vec::new());
                    room = self.micro_batch_size;
                }
                let taken = room.min(count - first);
                let last = first + taken - 1;
                if let Some(windows) = micro_batches.last_mut() {
                    windows.push(Window { unit, first, last });
                }
                room -= taken;
                first += taken;
            }
        }
        micro_batches.retain(|windows| !windows.is_empty());
        micro_batches
    }

    fn step(self, units: &[Unit], micro_batches: &[Vec<Window>]) -> StepBatches {
        let mut step = StepBatches::default();
        for windows in micro_batches {
            let passes = windows.chunks(if self.sample_packing {
                windows.len()
            } else {
                1
            });
            step.micro_batches
                .extend(passes.map(|pass| batch(units, pass)));
        }
        let batches = step.micro_batches.iter();
        step.num_target_tokens = batches.map(num_targets).sum();
        step
    }
}

fn last_end(unit: &Unit) -> usize {
    unit.target_ends.last().copied().unwrap_or(0)
}

fn num_targets(batch: &Batch) -> usize {
    let learnt = batch.target_ids.iter().filter(|id| **id != IGNORE_INDEX);
    learnt.count()
}

/// Lays windows end to end, each with its own positions.
fn batch(units: &[Unit], windows: &[Window]) -> Batch {
    let mut batch = Batch {
        cu_seqlens: vec![0],
        ..Batch::default()
    };
    for window in windows {
        let unit = &units[window.unit];
        let end = unit.target_ends[window.last];
        // Labels up to here belong to targets learnt in other windows.
        let learnt_from = match window.first {
            0 => 0,
            first => unit.target_ends[first - 1],
        };
        batch.input_ids.extend_from_slice(&unit.input_ids[..end]);
        batch.target_ids.extend((1..=end).map(|next| {
            let is_learnt = next < end && next >= learnt_from;
            if is_learnt {
                unit.labels[next]
            } else {
                IGNORE_INDEX
            }
        }));
        let length = u32::try_from(end).unwrap_or(u32::MAX);
        batch.position_ids.extend(0..length);
        let total = u32::try_from(batch.input_ids.len()).unwrap_or(u32::MAX);
        batch.cu_seqlens.push(total);
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unit(lengths: &[usize], line: usize) -> Unit {
        // Each target: one token of prompt, then `length` learnt tokens.
        let (mut input_ids, mut labels, mut target_ends) = (Vec::new(), Vec::new(), Vec::new());
        for length in lengths {
            let first = u32::try_from(line * 1000 + input_ids.len()).unwrap();
            input_ids.push(first);
            labels.push(IGNORE_INDEX);
            for id in first + 1..=first + u32::try_from(*length).unwrap() {
                input_ids.push(id);
                labels.push(i32::try_from(id).unwrap());
            }
            target_ends.push(input_ids.len());
        }
        let source = (0, line);
        Unit {
            input_ids,
            labels,
            target_ends,
            source,
            group: line,
        }
    }

    fn packing(
        micro: usize,
        accumulation: usize,
        sample_packing: bool,
        seed: Option<u64>,
    ) -> Packing {
        Packing {
            micro_batch_size: micro,
            gradient_accumulation_steps: accumulation,
            sample_packing,
            shuffle_seed: seed,
        }
    }

    #[test]
    fn a_conversation_is_cut_where_the_micro_batch_is_full() {
        let units = [unit(&[2, 1, 1], 1), unit(&[1], 2)];
        let steps = packing(2, 1, true, None).epoch(&units, 0);
        assert_eq!(steps.len(), 2);
        let first = &steps[0].micro_batches[0];
        assert_eq!(first.cu_seqlens, [0, 5]);
        assert_eq!(first.target_ids, [1001, 1002, -100, 1004, -100]);
        let second = &steps[1].micro_batches[0];
        // The third target with its whole context, of which nothing is learnt again.
        assert_eq!(second.cu_seqlens, [0, 7, 9]);
        assert_eq!(
            second.target_ids,
            [-100, -100, -100, -100, -100, 1006, -100, 2001, -100]
        );
        assert_eq!(second.position_ids, [0, 1, 2, 3, 4, 5, 6, 0, 1]);
    }

    proptest! {
        #[test]
        fn every_target_is_learnt_exactly_once_per_epoch(
            lengths in prop::collection::vec(prop::collection::vec(1usize..5, 1..5), 1..20),
            micro in 1usize..6, accumulation in 1usize..4, packed: bool, seed in prop::option::of(0u64..9), epoch in 0usize..3,
        ) {
            let units: Vec<Unit> = lengths.iter().enumerate().map(|(line, l)| unit(l, line + 1)).collect();
            let packing = packing(micro, accumulation, packed, seed);
            let steps = packing.epoch(&units, epoch);
            prop_assert_eq!(steps.len(), packing.steps_per_epoch(&units));
            let mut learnt: Vec<i32> = Vec::new();
            for step in &steps {
                let before = learnt.len();
                for batch in &step.micro_batches {
                    prop_assert!(batch.input_ids.len() <= packing.max_tokens(&units, 3));
                    prop_assert_eq!(*batch.cu_seqlens.last().unwrap() as usize, batch.input_ids.len());
                    for (position, target) in batch.target_ids.iter().enumerate() {
                        if *target != IGNORE_INDEX {
                            prop_assert_eq!(u32::try_from(*target).unwrap(), batch.input_ids[position + 1]);
                            learnt.push(*target);
                        }
                    }
                }
                prop_assert_eq!(learnt.len() - before, step.num_target_tokens);
            }
            let mut expected: Vec<i32> = units.iter().flat_map(|unit| &unit.labels).copied().filter(|l| *l >= 0).collect();
            learnt.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(learnt, expected);
        }
    }
}
