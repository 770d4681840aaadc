//! Which answers count as errors of a rollout: those with a status of 500 on, unless its file says more; and how many answers are of
//! the classes that are no errors by themselves, but are harm where a canary gives more of them than stable does.

use std::ops::{AddAssign, SubAssign};

use serde::{Deserialize, Serialize};

/// Classes of statuses that count as errors beside 5xx. What never came is an error in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ErrorClasses {
    /// Answers from 400 to 499 count.
    pub client: bool,
    /// Answers from 300 to 399 count.
    pub redirect: bool,
}

impl ErrorClasses {
    /// Returns true when an answer with this status counts as an error. 501 and 505 are answers to a request that nobody
    /// implements, whatever version it meets.
    #[inline]
    pub fn has(self, status: u16) -> bool {
        match status / 100 {
            3 => self.redirect,
            4 => self.client,
            class => class >= 5 && !matches!(status, 501 | 505),
        }
    }
}

/// Answers that are no errors by themselves, by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClassCounts {
    /// Answers from 400 to 499.
    pub client: u64,
    /// Answers from 300 to 399 but for 304, which tells that a client's copy is good.
    pub redirect: u64,
}

impl ClassCounts {
    /// Counts an answer with this status.
    pub fn add(&mut self, status: u16) {
        match status / 100 {
            4 => self.client += 1,
            3 if status != 304 => self.redirect += 1,
            _ => {}
        }
    }

    /// Returns the counts in the order in which classes are compared: 4xx, 3xx.
    pub fn by_class(self) -> [u64; 2] {
        [self.client, self.redirect]
    }

    /// Returns these counts, none of them above `answers`.
    pub fn within(self, answers: u64) -> Self {
        Self { client: self.client.min(answers), redirect: self.redirect.min(answers) }
    }
}

impl AddAssign for ClassCounts {
    fn add_assign(&mut self, other: Self) {
        self.client += other.client;
        self.redirect += other.redirect;
    }
}

impl SubAssign for ClassCounts {
    fn sub_assign(&mut self, other: Self) {
        self.client -= other.client;
        self.redirect -= other.redirect;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_class_and_304_is_none() {
        let mut counts = ClassCounts::default();
        [200, 204, 301, 304, 307, 401, 404, 429, 500, 503].into_iter().for_each(|status| counts.add(status));
        assert_eq!(counts.by_class(), [3, 2]);
        assert_eq!(counts.within(2), ClassCounts { client: 2, redirect: 2 });
    }

    #[test]
    fn statuses_count_by_their_class() {
        let count = |client, redirect| {
            let classes = ErrorClasses { client, redirect };
            [101, 200, 299, 300, 307, 399, 400, 404, 429, 499, 500, 501, 503, 505, 599]
                .map(|status| u8::from(classes.has(status)))
        };
        assert_eq!(count(false, false), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]);
        assert_eq!(count(true, false), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1]);
        assert_eq!(count(false, true), [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1]);
    }
}
