"""What a public function does before its maths: checks its arguments, is compiled once, refuses a gradient it lacks."""
