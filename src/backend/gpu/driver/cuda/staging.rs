//! The ring of pinned memory that writes go through: where the next bytes go, and which copies must be done before.

use std::collections::VecDeque;

/// Start and length of every piece are multiples of this.
pub(super) const ALIGNMENT: usize = 256;

/// Pieces in flight, oldest first, each with what tells that its copy is done. They lie one behind the other and never
/// over the end.
#[derive(Debug)]
pub(super) struct Ring<T> {
    num_bytes: usize,
    /// End of the newest piece.
    head: usize,
    in_flight: VecDeque<Piece<T>>,
}

#[derive(Debug)]
struct Piece<T> {
    start: usize,
    done: T,
}

impl<T> Ring<T> {
    /// An empty ring of `num_bytes`.
    pub(super) fn new(num_bytes: usize) -> Self {
        Self {
            num_bytes,
            head: 0,
            in_flight: VecDeque::new(),
        }
    }

    /// Where `len` bytes fit beside the pieces in flight; `None` until older ones are retired.
    pub(super) fn place(&self, len: usize) -> Option<usize> {
        let len = len.next_multiple_of(ALIGNMENT);
        let Some(oldest) = self.in_flight.front() else {
            return (len <= self.num_bytes).then_some(0);
        };
        if self.head > oldest.start {
            if len <= self.num_bytes - self.head {
                return Some(self.head);
            }
            return (len <= oldest.start).then_some(0);
        }
        (len <= oldest.start - self.head).then_some(self.head)
    }

    /// Takes `len` bytes from `start` on, which `place` gave, until `done` says that they are free.
    pub(super) fn push(&mut self, start: usize, len: usize, done: T) {
        self.head = start + len.next_multiple_of(ALIGNMENT);
        self.in_flight.push_back(Piece { start, done });
    }

    /// What tells that the oldest piece is free.
    pub(super) fn oldest(&self) -> Option<&T> {
        self.in_flight.front().map(|piece| &piece.done)
    }

    /// Gives back the oldest piece, whose copy the caller waits for before the bytes are used again.
    pub(super) fn retire(&mut self) -> Option<T> {
        self.in_flight.pop_front().map(|piece| piece.done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_wait_for_nothing_until_the_ring_is_full() {
        let mut ring = Ring::new(1024);
        for (index, start) in [0, 256, 512, 768].into_iter().enumerate() {
            assert_eq!(ring.place(1), Some(start));
            ring.push(start, 1, index);
        }
        assert_eq!(ring.place(1), None);
        assert_eq!(ring.retire(), Some(0));
        assert_eq!(ring.place(256), Some(0));
        assert_eq!(ring.place(257), None);
    }

    #[test]
    fn a_piece_never_lies_over_the_end() {
        let mut ring = Ring::new(1024);
        ring.push(0, 512, 0);
        ring.push(512, 256, 1);
        assert_eq!(ring.place(512), None);
        assert_eq!(ring.retire(), Some(0));
        assert_eq!(ring.place(512), Some(0));
        ring.push(0, 512, 2);
        assert_eq!(ring.place(1), None);
        assert_eq!(ring.retire(), Some(1));
        assert_eq!(ring.place(512), Some(512));
    }

    #[test]
    fn pieces_in_flight_never_overlap() {
        let mut ring = Ring::new(16 * ALIGNMENT);
        let mut taken: VecDeque<(usize, usize)> = VecDeque::new();
        for index in 0..1000 {
            let len = 1 + (index * 7919) % (16 * ALIGNMENT);
            let start = loop {
                if let Some(start) = ring.place(len) {
                    break start;
                }
                assert!(ring.retire().is_some());
                taken.pop_front();
            };
            assert!(start + len <= 16 * ALIGNMENT);
            let is_apart = |(other, end): &(usize, usize)| start + len <= *other || *end <= start;
            assert!(taken.iter().all(is_apart));
            taken.push_back((start, start + len));
            ring.push(start, len, index);
        }
    }

    #[test]
    fn what_is_longer_than_the_ring_never_fits() {
        assert_eq!(Ring::<()>::new(1024).place(1025), None);
    }
}
