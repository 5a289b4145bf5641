//! Fetches a list page by page, up to a limit.

use clap::Args;

use super::error::CliError;

/// Small enough for a response without delay, large enough for few calls.
const MAX_PAGE_SIZE: usize = 500;

/// Flags that limit how much of a list is fetched.
#[derive(Debug, Args)]
pub(super) struct PageArgs {
    /// The largest number of records to show
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Show all records, however many there are
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

#[derive(Debug)]
pub(super) struct FetchedList<T> {
    pub(super) items: Vec<T>,
    /// The token of the page after `items`; empty after the last.
    pub(super) next_page_token: String,
}

impl<T> FetchedList<T> {
    /// Returns a note for people if the list is incomplete.
    pub(super) fn truncation_note(&self) -> Option<String> {
        (!self.next_page_token.is_empty()).then(|| {
            format!("Only the first {} are shown: --all shows all, --limit N more.\n", self.items.len())
        })
    }
}

impl PageArgs {
    /// Fetches pages with `page`, whose arguments are a page's size and the token that it starts from.
    pub(super) async fn fetch_pages<T>(
        &self,
        mut page: impl AsyncFnMut(u32, String) -> Result<(Vec<T>, String), CliError>,
    ) -> Result<FetchedList<T>, CliError> {
        let limit = if self.all { usize::MAX } else { self.limit as usize };
        let mut fetched = FetchedList { items: Vec::new(), next_page_token: String::new() };
        loop {
            let size = MAX_PAGE_SIZE.min(limit - fetched.items.len());
            let (items, next) = page(size as u32, fetched.next_page_token.clone()).await?;
            fetched.items.extend(items);
            if next == fetched.next_page_token && !next.is_empty() {
                return Err(CliError::new("the server repeats the same page"));
            }
            fetched.next_page_token = next;
            if fetched.next_page_token.is_empty() || fetched.items.len() >= limit {
                return Ok(fetched);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list of 1,200 numbers whose page tokens are where they start.
    async fn fetch(limit: u32, all: bool) -> (usize, String, Vec<u32>) {
        let mut sizes = Vec::new();
        let fetched = PageArgs { limit, all }
            .fetch_pages(async |size, token: String| {
                sizes.push(size);
                let start: u32 = token.parse().unwrap_or(0);
                let end = (start + size).min(1_200);
                Ok(((start..end).collect(), if end < 1_200 { end.to_string() } else { String::new() }))
            })
            .await
            .unwrap();
        assert!(
            fetched.items.iter().copied().eq(0..fetched.items.len() as u32),
            "nothing twice, nothing missed"
        );
        (fetched.items.len(), fetched.next_page_token, sizes)
    }

    #[tokio::test]
    async fn pages_are_fetched_up_to_the_limit_and_no_further() {
        assert_eq!(fetch(100, false).await, (100, "100".to_owned(), vec![100]));
        assert_eq!(fetch(700, false).await, (700, "700".to_owned(), vec![500, 200]));
        assert_eq!(fetch(5_000, false).await, (1_200, String::new(), vec![500, 500, 500]));
    }

    #[tokio::test]
    async fn all_is_all() {
        assert_eq!(fetch(1, true).await, (1_200, String::new(), vec![500, 500, 500]));
    }

    #[tokio::test]
    async fn a_server_that_repeats_a_page_is_left() {
        let error = PageArgs { limit: 1, all: true }
            .fetch_pages(async |_, _| Ok((vec![0u8], "same".to_owned())))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("repeats"), "{error}");
    }
}
