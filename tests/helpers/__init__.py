"""What several test modules share: small nets, teams, data and runs, and truths to compare with."""
