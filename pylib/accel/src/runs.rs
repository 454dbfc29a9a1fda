//! Lists of runs, which grow at their end up to a limit.

/// Runs (start, count) of whatever a kernel looks for.
pub struct Runs {
    pub list: Vec<(usize, usize)>,
    limit: usize,
}

impl Runs {
    pub fn new(limit: usize) -> Self {
        Runs {
            list: Vec::new(),
            limit,
        }
    }

    /// Append a run, or join it to the last one; false, and nothing done, if that would exceed the limit.
    pub fn push(&mut self, start: usize, count: usize) -> bool {
        if let Some((last, length)) = self.list.last_mut() {
            if *last + *length == start {
                *length += count;
                return true;
            }
        }
        if self.list.len() >= self.limit {
            return false;
        }
        self.list.push((start, count));
        true
    }
}
