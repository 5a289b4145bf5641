//! Bounds a page of records in bytes: a page is read from the database in steps, and ends when an answer of it would be
//! too large for a client.

/// The largest page in bytes: most gRPC clients take messages of 4 MiB.
pub const MAX_PAGE_BYTES: usize = 3 << 20;
/// How many records the first step reads, when their size is not known yet.
const FIRST_STEP: usize = 50;
/// The most that one step reads.
const MAX_STEP: usize = 500;

/// What a page still has room for.
#[derive(Debug)]
pub struct PageBudget {
    size: usize,
    taken: usize,
    bytes: usize,
}

impl PageBudget {
    /// An empty page of at most `size` records.
    #[must_use]
    pub fn new(size: u32) -> PageBudget {
        PageBudget { size: size as usize, taken: 0, bytes: 0 }
    }

    /// How many records to read next; 0 when the page is full. As many as fit if they are like those before.
    #[must_use]
    pub fn step(&self) -> u32 {
        let left = self.size - self.taken;
        let fitting = match self.bytes / self.taken.max(1) {
            0 => FIRST_STEP,
            average => (MAX_PAGE_BYTES - self.bytes) / average + 1,
        };
        u32::try_from(left.min(fitting).min(MAX_STEP)).unwrap_or(u32::MAX)
    }

    /// Takes a record of so many bytes, if there is room for it. There always is for the first.
    #[must_use]
    pub fn take(&mut self, bytes: usize) -> bool {
        let fits = self.taken == 0 || self.bytes + bytes <= MAX_PAGE_BYTES;
        if fits {
            self.taken += 1;
            self.bytes = (self.bytes + bytes).min(MAX_PAGE_BYTES);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps that read a page of records of this size, and how many records it has in the end.
    fn read(size: u32, bytes: usize) -> (Vec<u32>, usize) {
        let (mut budget, mut steps) = (PageBudget::new(size), Vec::new());
        loop {
            let step = budget.step();
            if step == 0 {
                return (steps, budget.taken);
            }
            steps.push(step);
            for _ in 0..step {
                if !budget.take(bytes) {
                    return (steps, budget.taken);
                }
            }
        }
    }

    #[test]
    fn small_records_are_read_in_few_steps_and_large_ones_never_many_at_once() {
        assert_eq!(read(20, 1000), (vec![20], 20));
        assert_eq!(read(1000, 1000), (vec![50, 500, 450], 1000));
        let (steps, taken) = read(1000, 40_000);
        assert_eq!((steps, taken), (vec![50, 29], MAX_PAGE_BYTES / 40_000));
    }

    #[test]
    fn a_record_larger_than_a_page_is_a_page_of_its_own() {
        let mut budget = PageBudget::new(10);
        assert!(budget.take(2 * MAX_PAGE_BYTES) && !budget.take(1));
        assert_eq!(budget.step(), 1);
    }
}
