"""Native C++ on the CPU: hands addresses to sleepkern._C."""
