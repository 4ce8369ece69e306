//! A body's bytes, gathered while they come.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Data put together as it comes. A single piece is not copied; many pieces take no more room than their bytes
/// and a part of a block, since what grows by doubling would leave holes of every size behind it.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    first: Bytes,
    /// All full but the last.
    blocks: VecDeque<BytesMut>,
    length: usize,
}

/// What a slow body takes at once, in bytes: half of it is empty, on the average, and nobody counts that. By twice as much, 500 slow
/// bodies took 6 MB more; by half as much, no less.
const BLOCK: usize = 8 * 1024;

impl Gathered {
    pub fn push(&mut self, data: Bytes) {
        let is_first = self.length == 0;
        self.length += data.len();
        if is_first {
            self.first = data;
            return;
        }
        // Copied, since a piece holds on to all of the buffer that it was read into.
        let first = std::mem::take(&mut self.first);
        self.copy(&first);
        self.copy(&data);
    }

    fn copy(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let room = self.blocks.back().map_or(0, |block| block.capacity() - block.len());
            let (fits, rest) = data.split_at(room.min(data.len()));
            match self.blocks.back_mut() {
                Some(block) if room > 0 => block.extend_from_slice(fits),
                _ => self.blocks.push_back(BytesMut::with_capacity(BLOCK)),
            }
            data = rest;
        }
    }

    pub fn len(&self) -> usize {
        self.length
    }

    /// Makes room for so many bytes, with those that are here.
    pub fn make_room(&mut self, whole: usize) {
        let mut all = BytesMut::with_capacity(whole);
        all.extend_from_slice(&std::mem::take(&mut self.first));
        // Each block is given back as soon as it was copied.
        while let Some(block) = self.blocks.pop_front() {
            all.extend_from_slice(&block);
        }
        self.blocks.push_back(all);
    }

    pub fn into_bytes(mut self) -> Bytes {
        if self.blocks.is_empty() {
            return self.first;
        }
        // A peer of HTTP/2 may end before what it announced: room for that is not kept, since nobody counts it further on.
        let is_short = self.blocks.back().is_some_and(|last| last.capacity() - last.len() > BLOCK);
        if self.blocks.len() > 1 || is_short {
            self.make_room(self.length);
        }
        self.blocks.pop_front().unwrap_or_default().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gathered_is_the_same_with_room_for_all_of_it_and_without() {
        let sent: Vec<u8> = (0..100_000_u32).map(|byte| byte as u8).collect();
        for piece in [1_000, BLOCK, 30_000, sent.len()] {
            for room_after in [1, 2, 3, usize::MAX] {
                let mut gathered = Gathered::default();
                for (number, piece) in sent.chunks(piece).enumerate() {
                    if number == room_after {
                        gathered.make_room(sent.len());
                        let room: usize = gathered.blocks.iter().map(BytesMut::capacity).sum();
                        assert!((sent.len()..sent.len() + BLOCK).contains(&room), "{room}");
                    }
                    gathered.push(Bytes::copy_from_slice(piece));
                    assert!(number < room_after || gathered.blocks.len() == 1);
                }
                assert_eq!(gathered.len(), sent.len());
                assert_eq!(gathered.into_bytes(), sent);
            }
        }
    }

    #[test]
    fn room_for_what_did_not_come_is_not_kept() {
        let mut gathered = Gathered::default();
        gathered.push(Bytes::from_static(b"a start"));
        gathered.make_room(1_000_000);
        gathered.push(Bytes::from_static(b", and no more"));
        let bytes = gathered.into_bytes().try_into_mut().expect("nobody else has it");
        assert_eq!(bytes, "a start, and no more");
        assert!(bytes.capacity() < BLOCK, "{}", bytes.capacity());
    }
}
