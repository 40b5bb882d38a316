//! Tables whose columns are as wide as their widest cells.

/// The table, a line for each row; spaces at the end of lines are left out.
pub fn table<S: AsRef<str>, R: AsRef<[String]>>(head: &[S], rows: &[R]) -> String {
    let head: Vec<String> = head.iter().map(|cell| cell.as_ref().to_owned()).collect();
    let lines: Vec<&[String]> =
        std::iter::once(head.as_slice()).chain(rows.iter().map(AsRef::as_ref)).collect();
    let columns = lines.iter().map(|line| line.len()).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["abc".to_owned(), "x".to_owned()], vec!["d".to_owned(), "yyy".to_owned()]];
        assert_eq!(table(&["ID", "LONG NAME"], &rows), "ID   LONG NAME\nabc  x\nd    yyy\n");
    }
}
