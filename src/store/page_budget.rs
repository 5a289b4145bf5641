//! Limits a page of records in bytes.
//!
//! A page is read from the database in steps. It ends before its message becomes too large for a client.

/// The largest page in bytes: most gRPC clients take messages of 4 MiB.
pub const MAX_PAGE_BYTES: usize = 3 << 20;
/// How many records the first step reads, when their size is not known yet.
const FIRST_STEP_RECORDS: usize = 50;
/// The most that one step reads.
const MAX_STEP_RECORDS: usize = 500;

/// The remaining space of a page.
#[derive(Debug)]
pub struct PageBudget {
    max_records: usize,
    record_count: usize,
    bytes: usize,
}

impl PageBudget {
    /// An empty page of at most `size` records.
    #[must_use]
    pub fn new(size: u32) -> PageBudget {
        PageBudget { max_records: size as usize, record_count: 0, bytes: 0 }
    }

    /// How many records to read next; 0 if the page is full. It assumes that they are as large as those before.
    #[must_use]
    pub fn next_step_size(&self) -> u32 {
        let left = self.max_records - self.record_count;
        let fitting = match self.bytes / self.record_count.max(1) {
            0 => FIRST_STEP_RECORDS,
            average => (MAX_PAGE_BYTES - self.bytes) / average + 1,
        };
        u32::try_from(left.min(fitting).min(MAX_STEP_RECORDS)).unwrap_or(u32::MAX)
    }

    /// Adds a record of this size if it fits. The first record always fits.
    #[must_use]
    pub fn try_add(&mut self, bytes: usize) -> bool {
        let fits = self.record_count == 0 || self.bytes + bytes <= MAX_PAGE_BYTES;
        if fits {
            self.record_count += 1;
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
            let step = budget.next_step_size();
            if step == 0 {
                return (steps, budget.record_count);
            }
            steps.push(step);
            for _ in 0..step {
                if !budget.try_add(bytes) {
                    return (steps, budget.record_count);
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
        assert!(budget.try_add(2 * MAX_PAGE_BYTES) && !budget.try_add(1));
        assert_eq!(budget.next_step_size(), 1);
    }
}
