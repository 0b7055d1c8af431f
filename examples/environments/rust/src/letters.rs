//! The tasks and what an answer is worth. Knows no gRPC.

use std::collections::HashSet;

pub const SPLITS: [(&str, usize); 2] = [("train", 2048), ("heldout", 256)];
const LENGTHS: std::ops::RangeInclusive<u64> = 3..=5;
/// Of letters that a task's field may have.
pub const MAX_LETTERS: usize = 100;

pub struct Task {
    pub id: String,
    pub split: &'static str,
    pub letters: String,
}

impl Task {
    /// What the model is asked.
    pub fn prompt(&self) -> String {
        format!("sort {}", self.letters)
    }
}

/// What an answer is worth: `reward` is the mean of the two others.
pub struct Worth {
    pub reward: f64,
    pub exact: f64,
    pub positions: f64,
    pub answer: String,
}

/// All tasks, split by split, in an order that does not change. No letters are in both.
pub fn tasks() -> Vec<Task> {
    let mut seen = HashSet::new();
    let mut random = SplitMix64(0);
    let mut all = Vec::new();
    for (split, count) in SPLITS {
        for number in 0..count {
            let letters = loop {
                let letters = draw(&mut random);
                if sorted(&letters) != letters && seen.insert(letters.clone()) {
                    break letters;
                }
            };
            all.push(Task {
                id: format!("{split}-{number}"),
                split,
                letters,
            });
        }
    }
    all
}

/// Whether `letters` can be the field of a task: some lower-case letters.
pub fn are_letters(letters: &str) -> bool {
    (1..=MAX_LETTERS).contains(&letters.len()) && letters.bytes().all(|b| b.is_ascii_lowercase())
}

/// Half for the right answer, half for the share of the places that have the right letter.
pub fn worth(letters: &str, answer: &str) -> Worth {
    let right = sorted(letters);
    let given = answer.trim();
    let hits = right
        .bytes()
        .zip(given.bytes())
        .filter(|(a, b)| a == b)
        .count();
    let positions = hits as f64 / right.len().max(given.len()) as f64;
    let exact = if given == right { 1.0 } else { 0.0 };
    Worth {
        reward: (exact + positions) / 2.0,
        exact,
        positions,
        answer: right,
    }
}

fn sorted(letters: &str) -> String {
    let mut chars: Vec<char> = letters.chars().collect();
    chars.sort_unstable();
    chars.into_iter().collect()
}

fn draw(random: &mut SplitMix64) -> String {
    let length = LENGTHS.start() + random.next() % (LENGTHS.end() - LENGTHS.start() + 1);
    (0..length)
        .map(|_| char::from(b'a' + (random.next() % 26) as u8))
        .collect()
}

/// The same numbers for the same seed, in every version of Rust and on every machine.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
