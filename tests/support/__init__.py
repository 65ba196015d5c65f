"""What tests share: tiny models, data and projects, servers, and the processes that tests start. No test is here."""
