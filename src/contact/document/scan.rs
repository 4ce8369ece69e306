//! Searches for what is near: each ends after a few bytes, where to begin one that is made for long texts takes longer than
//! to end it.

use wide::u8x16;

/// How many bytes are looked at at once: as many as a register of each processor holds.
const BLOCK: usize = 16;

/// The most blocks that are looked at here. What is further away is searched by memchr, which looks at more at once.
const NEAR: usize = 4;

/// How many blocks lines are indented by at most, as clients write them.
const INDENTED: usize = 2;

/// Where the first of these bytes is.
#[inline(always)]
fn position<const N: usize>(
    text: &[u8],
    bytes: [u8; N],
    further: impl FnOnce(&[u8]) -> Option<usize>,
) -> Option<usize> {
    let wanted = bytes.map(u8x16::splat);
    for (number, block) in text.as_chunks().0.iter().take(NEAR).enumerate() {
        let block = u8x16::new(*block);
        let hits = wanted.map(|byte| block.simd_eq(byte));
        let hits = hits.into_iter().fold(u8x16::splat(0), |all, hits| all | hits).to_bitmask();
        if hits != 0 {
            return Some(number * BLOCK + hits.trailing_zeros() as usize);
        }
    }
    let passed = (text.len() / BLOCK).min(NEAR) * BLOCK;
    further(&text[passed..]).map(|at| passed + at)
}

/// Where the first markup or reference begins.
#[inline]
pub(super) fn markup(text: &[u8]) -> Option<usize> {
    position(text, [b'<', b'&'], |rest| memchr::memchr2(b'<', b'&', rest))
}

/// Where a value ends: with its `quote`, or with what may not stand in it.
#[inline]
pub(super) fn value_end(text: &[u8], quote: u8) -> Option<usize> {
    position(text, [quote, b'<', b'&'], |rest| memchr::memchr3(quote, b'<', b'&', rest))
}

/// How many bytes go by before there is a letter or markup, as far as lines are indented.
#[inline]
pub(super) fn blank(text: &[u8]) -> usize {
    let letter = u8x16::splat(b' ' + 1);
    for (number, block) in text.as_chunks().0.iter().take(INDENTED).enumerate() {
        let block = u8x16::new(*block);
        let others = block.max(letter).simd_eq(block).to_bitmask();
        if others != 0 {
            return number * BLOCK + others.trailing_zeros() as usize;
        }
    }
    let passed = (text.len() / BLOCK).min(INDENTED) * BLOCK;
    let rest = &text[passed..text.len().min(INDENTED * BLOCK)];
    passed + rest.iter().position(|&byte| byte > b' ').unwrap_or(rest.len())
}

/// How many letters of ASCII `text` starts with, or fewer.
#[inline]
pub(super) fn letters(text: &[u8]) -> usize {
    let Some(block) = text.first_chunk() else { return 0 };
    let lower = u8x16::new(*block) | u8x16::splat(b' ');
    let place = lower - u8x16::splat(b'a');
    let are_letters = place.min(u8x16::splat(b'z' - b'a')).simd_eq(place).to_bitmask();
    // Nothing is said of what is behind the block.
    (!are_letters).trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each search, and what it looks for, byte by byte.
    type Search = (fn(&[u8]) -> Option<usize>, fn(&[u8]) -> Option<usize>);

    const SEARCHES: [Search; 4] = [
        (markup, |text| text.iter().position(|byte| b"<&".contains(byte))),
        (|text| value_end(text, b'\''), |text| text.iter().position(|byte| b"'<&".contains(byte))),
        (
            |text| Some(blank(text)),
            |text| {
                let near = &text[..text.len().min(INDENTED * BLOCK)];
                Some(near.iter().position(|&byte| byte > b' ').unwrap_or(near.len()))
            },
        ),
        (
            |text| Some(letters(text)),
            |text| {
                let near = &text[..if text.len() < BLOCK { 0 } else { BLOCK }];
                let is_letter = |byte: &&u8| byte.is_ascii_alphabetic();
                Some(near.iter().take_while(is_letter).count())
            },
        ),
    ];

    #[test]
    fn each_search_finds_what_a_look_at_byte_after_byte_finds_wherever_it_stands() {
        let each: Vec<u8> = (0..=u8::MAX).collect();
        // Longer than all blocks that are looked at, each byte in a short one.
        for (lengths, bytes) in [(0..100, &b"<&' !az{A@Z["[..]), (16..18, &each)] {
            for (length, filler) in lengths.flat_map(|it| b" \naZ<'\x00\x80\xff".map(|at| (it, at)))
            {
                let mut text = vec![filler; length];
                for place in 0..length {
                    for &byte in bytes {
                        text[place] = byte;
                        for (number, (search, expected)) in SEARCHES.iter().enumerate() {
                            let (found, expected) = (search(&text), expected(&text));
                            assert_eq!(found, expected, "{number}: {}", text.escape_ascii());
                        }
                    }
                    text[place] = filler;
                }
            }
        }
    }
}
