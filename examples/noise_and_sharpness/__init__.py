"""Claims of 2020 to 2026 on gradient noise and sharpness, measured side by side."""
