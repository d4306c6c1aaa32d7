"""What a study is about, and how answers are judged there."""
