from fastlvm.cli import main

main()
